"""What a rule says of one tensor."""

from dataclasses import dataclass


@dataclass
class QuantSpec:
    """How one tensor is quantized; the `weight:` or `input:` part of a rule."""

    bits: int = 32  # 2 to 8; 16 for softmax outputs; 32 leaves the tensor alone
    per: str = "tensor"  # tensor | channel | group | head
    group_size: int = 0  # channels per group for per: group
    symmetric: bool = False  # signed codes and zero point 0
    grid: str = "uniform"  # uniform | log2: powers of two up to 1, for softmax outputs
    range: str = "minmax"  # a word of quant.ranges.RANGES
    tail: float = 0.001  # fraction left out at either end by range: percentile
    ema: float = 0.0  # > 0: average the interval of successive batches, old weight `ema`
    per_segment: bool = False  # of a weight: an own one for every time segment
    segment_bits: tuple = ()  # of an input: bits in each time segment, in place of `bits`
    static: bool = False  # of an input: one scale for all time segments

    def options(self) -> dict[str, float]:
        """Options of the range search."""
        return {"tail": self.tail} if self.range == "percentile" else {}


GRIDS = ("uniform", "log2")
PER = ("tensor", "channel", "group", "head")
