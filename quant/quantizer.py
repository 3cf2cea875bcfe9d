"""The quantizer of one tensor: scale and zero point of shape (segments, groups).

Uniform affine quantization: code = clamp(round(x/scale) + z), value = (code - z) * scale. Gradients
are those of LSQ (Esser et al. 2020, arXiv:1902.08153, Eq. 3): rounding passes them straight through
where x lies between the end codes; there the gradient of the value to `scale` is round(x/s) - x/s,
beyond them it is the end code. The code of BRECQ, QDrop and Q-Diffusion counts the half step beyond
an end code, which rounds to it, as inside. Where many values lie there, as the minimum of SiLU
does, that gradient pulls the scale the wrong way."""

from dataclasses import replace

import torch
from torch import nn

from quant.grid import LOG2_TOP, StraightThrough, code_range, log2_codes, scale_zero_point
from quant.groups import num_groups
from quant.observer import VALUES_PER_GROUP, pooled
from quant.ranges import find_range


class Quantizer(nn.Module):
    """Quantizer of one tensor. `group_of` as made by quant.groups; `timeline` says the segment
    (None: static)."""

    def __init__(self, spec, group_of, timeline=None):
        super().__init__()
        self.spec, self.timeline = spec, None if spec.static else timeline
        shape = (self.timeline.num_segments if self.timeline else 1, num_groups(group_of))
        self.bits = list(spec.segment_bits) or [spec.bits] * shape[0]
        if len(self.bits) != shape[0]:
            raise ValueError(
                f"segment_bits names {len(self.bits)} widths, the timeline has {shape[0]} segments"
            )
        self.low, self.high = code_range(spec.bits, spec.symmetric)
        # NaN until fitted
        self.scale = nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)
        self.register_buffer("zero_point", torch.full(shape, float("nan")))
        self.register_buffer("group_of", group_of, persistent=False)
        self.enabled = True
        # while a pass learns: what gives the table of scales (quant/soft.py)
        self.__dict__["soft_scale"] = None
        self.__dict__["made_by"] = None  # afterwards: what gave it
        # while a pass learns: x -> which elements stay unquantized
        self.drop = None
        self.observed, self.samples_to_come = None, 0
        self.num_values = 0  # of a sample that share a scale, once observed

    def unfitted(self, timeline, **changes):
        """A fresh one for trials on another timeline, `changes` made to its specification; of the
        nominal width in every segment."""
        spec = replace(self.spec, segment_bits=(), **changes)
        return Quantizer(spec, self.group_of.clone(), timeline).to(self.scale.device)

    def extra_repr(self):
        return f"bits={self.spec.bits}, shape={tuple(self.scale.shape)}, range={self.spec.range}"

    def table(self, values, x):
        """Row(s) of a (segments, groups) table for the current segment, shaped to broadcast against
        x."""
        segment = self.timeline.segment if self.timeline else 0
        rows = values[segment]
        if rows.dim() == 1:
            return rows[self.group_of]
        rows = rows[:, self.group_of]  # (N, *group map)
        return rows.reshape(len(rows), *[1] * (x.dim() - rows.dim()), *rows.shape[1:])

    def active(self, x):
        """Whether x is to be quantized now; x is noted if a range is being observed."""
        if self.observed is not None:
            self.observe(x)
        return self.enabled

    @property
    def is_fitted(self):
        return not bool(self.scale.isnan().any())

    @property
    def learnable(self):
        """16-bit quantizers (softmax outputs of text models) and fixed grids keep their scale, as
        in released code."""
        return self.spec.bits < 16 and self.spec.grid == "uniform"

    def scales(self):
        """The table of scales in use (segments, groups)."""
        return self.scale if self.soft_scale is None else self.soft_scale()

    def codes(self, x):
        """Centred integer codes of x, as floats: code - zero_point. Chosen in float32, under
        autocast too."""
        x = x.float()
        if self.spec.grid == "log2":
            return log2_codes(x, self.spec.bits)
        codes = (
            self.codes_at(self.scale, x)
            if self.soft_scale is None
            else self.soft_scale.codes(self, x)
        )
        if self.drop is None:
            return codes
        return torch.where(self.drop(x), x / self.table(self.scales(), x), codes)

    def codes_at(self, scales, x):
        """Codes with another table of scales than the own one."""
        low, high = self.code_ends(x)
        return StraightThrough.apply(
            x, self.table(scales, x), self.table(self.zero_point, x), low, high
        )

    def code_ends(self, x):
        """Smallest and largest code: numbers, or tables shaped to broadcast where segments differ
        in bits."""
        if len(set(self.bits)) == 1:
            return code_range(self.bits[0], self.spec.symmetric)
        ends = torch.tensor(
            [code_range(bits, self.spec.symmetric) for bits in self.bits], device=x.device
        ).float()
        return tuple(self.table(end[:, None].expand_as(self.scale), x) for end in ends.unbind(1))

    @torch.no_grad()
    def harden(self):
        """Keep what a pass has learned as the table of scales, and how it was made in `made_by`."""
        if self.soft_scale is not None:
            self.scale.copy_(self.soft_scale.hard())
            self.__dict__.update(made_by=self.soft_scale, soft_scale=None)

    def learned_by(self):
        """Name -> parameter of what gave the table, if it was learned so."""
        return {} if self.made_by is None else dict(self.made_by.named_parameters())

    def forward(self, x):
        """x on its grid: codes times scale."""
        return self.codes(x) * self.table(self.scales(), x)

    def part_scales(self, x):
        """Scales of a per-tensor quantizer, one per concatenated part, each a scalar or (N, 1, ...)
        to multiply a result with as many axes as x."""
        rows = self.scales()[self.timeline.segment if self.timeline else 0]
        if rows.dim() == 1:
            return rows.unbind()
        return [column.reshape(-1, *[1] * (x.dim() - 1)) for column in rows.unbind(1)]

    @torch.no_grad()
    def observe(self, x):
        """Keep for each sample and group an even pick of the values and both extremes, (N, groups,
        picks + 2)."""
        flat, groups = x.detach().flatten(1), self.scale.shape[1]
        index = self.group_of.expand(x.shape[1:]).flatten()
        order, counts = index.argsort(stable=True), index.bincount(minlength=groups)
        self.num_values = int(counts.max())
        picks = max(1, min(self.num_values, VALUES_PER_GROUP // self.samples_to_come))
        position = torch.arange(picks, device=x.device) * (counts[:, None] - 1) // max(picks - 1, 1)
        values = flat[:, order[(counts.cumsum(0) - counts)[:, None] + position]]
        shape, target = (len(x), groups), index.expand(len(x), -1)
        ends = [
            flat.new_zeros(shape).scatter_reduce(1, target, flat, how, include_self=False)[
                :, :, None
            ]
            for how in ("amin", "amax")
        ]
        segment = self.timeline.segment if self.timeline else 0
        segment = torch.as_tensor(segment, device=x.device).expand(len(x))
        self.observed.append((torch.cat([values, *ends], dim=2), segment))

    def begin_observing(self, num_samples):
        """Start collecting; `num_samples` samples are going to pass, which sets how many values
        each may keep."""
        self.observed, self.samples_to_come = [], num_samples

    @torch.no_grad()
    def fit_observed(self, neighbours=0, batch_size=64):
        """Choose scale and zero point from what was observed, then forget it; for each segment also
        from the `neighbours` before and after it. With `ema` the intervals of successive
        `batch_size` samples of the segment are averaged. Raises ValueError where a segment, and
        these, were never seen."""
        batches, self.observed = self.observed, None
        for s in range(len(self.scale)):
            seen = [
                v
                for v in (values[(segment - s).abs() <= neighbours] for values, segment in batches)
                if len(v)
            ]
            if not seen:
                raise ValueError(
                    f"calibration data hold no sample in time segment {s} of {len(self.scale)}; "
                    "add steps to the calibration set or use fewer segments"
                )
            seen = torch.cat(seen)
            self.fit([pooled(v) for v in (seen.split(batch_size) if self.spec.ema else [seen])], s)

    @torch.no_grad()
    def fit(self, batches, segment=0, first=0):
        """Choose scale and zero point of the groups `first`, first + 1, ... of one segment from
        values (groups, K); several batches are averaged (EMA). The log2 grid is fixed."""
        if self.spec.grid == "log2":
            self.scale[segment], self.zero_point[segment] = 2.0**-LOG2_TOP, 0.0
            return
        ends = None
        for values in batches:
            found = find_range(
                self.spec.range,
                values.float(),
                self.bits[segment],
                self.spec.symmetric,
                **self.spec.options(),
            )
            keep = self.spec.ema
            ends = (
                found
                if ends is None
                else [keep * old + (1 - keep) * new for old, new in zip(ends, found)]
            )
        scale, zero_point = scale_zero_point(*ends, self.bits[segment], self.spec.symmetric)
        rows = slice(first, first + len(scale))
        self.scale[segment, rows], self.zero_point[segment, rows] = scale, zero_point
