"""What a rule says of one tensor."""

from dataclasses import dataclass


@dataclass
class QuantSpec:
    """How one tensor is quantized; the `weight:` or `input:` part of a rule."""

    # 2 to 8; 16 for softmax outputs; 32 leaves the tensor alone
    bits: int = 32
    per: str = "tensor"  # tensor | channel | group | head
    group_size: int = 0  # channels per group for per: group
    symmetric: bool = False  # signed codes and zero point 0
    # uniform | log2: powers of two up to 1, for softmax outputs
    grid: str = "uniform"
    range: str = "minmax"  # a word of quant.ranges.RANGES
    tail: float = 0.001  # fraction left out at either end by range: percentile
    # > 0: average the interval of successive batches, old weight `ema`
    ema: float = 0.0
    per_segment: bool = False  # of a weight: an own one for every time segment
    # of an input: bits in each time segment, in place of `bits`
    segment_bits: tuple = ()
    static: bool = False  # of an input: one scale for all time segments

    def options(self) -> dict[str, float]:
        """Options of the range search."""
        return {"tail": self.tail} if self.range == "percentile" else {}


GRIDS = ("uniform", "log2")
PER = ("tensor", "channel", "group", "head")
