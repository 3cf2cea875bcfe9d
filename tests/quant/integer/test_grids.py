"""Grids as numbers: one row for every time segment, and when two are one."""

import pytest
import torch

from quant.groups import activation_groups
from quant.integer.grids import Grid, why_no_grid
from quant.quantizer import Quantizer
from quant.spec import QuantSpec
from quant.timeline import Timeline


def quantizer(spec, timeline=None, splits=(), scale=0.1, zero_point=3.0):
    q = Quantizer(spec, activation_groups(spec.per, 4, 2, splits=splits), timeline)
    q.scale.fill_(scale)
    q.zero_point.fill_(zero_point)
    return q


def test_rows_follow_the_timeline():
    timeline = Timeline([500])
    q = quantizer(QuantSpec(bits=8), timeline)
    q.scale[:, 0], q.zero_point[:, 0] = torch.tensor([0.5, 0.25]), torch.tensor([10.0, 0.0])
    grid = Grid(q)
    for t, row in ((0.0, (2.0, -10, 245, 10)), (600.0, (4.0, 0, 255, 0))):
        timeline.set_time(torch.tensor([t]))
        assert grid.row[:4] == row


def test_signed_codes_are_stored_from_0():
    grid = Grid(quantizer(QuantSpec(bits=4, symmetric=True), zero_point=0.0))
    assert grid.row[1:4] == (-8, 7, 8)


def test_widths_may_differ_by_segment():
    spec = QuantSpec(bits=8, segment_bits=(4, 8))
    grid = Grid(quantizer(spec, Timeline([500])))
    assert [row[1:3] for row in grid.rows] == [(-3, 12), (-3, 252)]


def test_each_part_has_its_own():
    q = quantizer(QuantSpec(bits=8), splits=(1, 3))
    q.scale[0] = torch.tensor([0.5, 0.25])
    assert [Grid(q, part).row.inverse for part in (0, 1)] == [2.0, 4.0]


def test_grids_are_one_if_their_numbers_and_balances_are():
    timeline, spec = Timeline([500]), QuantSpec(bits=8)
    one, same, ones = quantizer(spec, timeline), quantizer(spec, timeline), torch.ones(4)
    assert Grid(one).equals(Grid(same))
    assert Grid(one, balance=ones).equals(Grid(same, balance=ones.clone()))
    others = [
        Grid(quantizer(spec, timeline, scale=0.2)),
        Grid(quantizer(spec, timeline, zero_point=4.0)),
        Grid(quantizer(QuantSpec(bits=4), timeline)),
        Grid(quantizer(spec)),  # static: one row
        Grid(same, balance=ones),
    ]
    assert not any(Grid(one).equals(other) for other in others)
    assert not Grid(one, balance=ones).equals(Grid(same, balance=2 * ones))


@pytest.mark.parametrize(
    "spec, reason",
    [
        (QuantSpec(bits=8), ""),
        (QuantSpec(bits=16), "its input has 16 bits"),
        (QuantSpec(bits=8, grid="log2"), "its codes are on the log2 grid"),
        (QuantSpec(bits=8, per="channel"), "its input has a scale for every channel"),
    ],
)
def test_what_has_no_grid_says_why(spec, reason):
    assert why_no_grid(quantizer(spec)) == reason
    assert why_no_grid(None) == "its input is not quantized"
