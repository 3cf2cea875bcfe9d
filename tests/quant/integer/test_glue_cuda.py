"""The glue for GPUs, traced and run on the CPU here: what it computes does not depend on the
device."""

import torch
from tiny import normal

from base.network import NormAct
from quant.integer import glue
from quant.integer.glue import Row
from quant.integer.glue_cuda import InductorGlue

ROW = Row(40.0, -100.0, 155.0, 100)


def test_compiled_glue_gives_the_codes_of_plain_pytorch():
    """To one code where a value lies next to the border of two."""
    compiled, x = (
        InductorGlue("aot_eager"),
        normal(2, 8, 4, 6).to(memory_format=torch.channels_last),
    )
    norm = NormAct(8, num_groups=4, eps=1e-5).requires_grad_(False)
    added, halves = normal(2, 8), normal(2, 2, 8, seed=1).unbind()
    balanced = ROW._replace(balance=(torch.rand(8) + 0.5).reshape(-1, 1, 1))
    assert torch.equal(compiled.quantize(x, ROW), glue.quantize(x, ROW))
    assert torch.equal(compiled.integers(x, balanced), glue.integers(x, balanced))
    scores = normal(2, 3, 5, 6)
    maps = compiled.softmax_quantize(scores, 0.5, ROW), glue.softmax_quantize(scores, 0.5, ROW)
    assert (maps[0].int() - maps[1].int()).abs().max() <= 1
    for given in ((), (added,), (None, halves)):
        found = compiled.norm_act_quantize(x, norm, balanced, *given)
        expected = glue.norm_act_quantize(x, norm, balanced, *given)
        assert found.dtype is torch.uint8
        assert (found.int() - expected.int()).abs().max() <= 1
        torch.testing.assert_close(
            compiled.norm_act(x, norm, *given), glue.norm_act(x, norm, *given)
        )


def test_numbers_of_a_row_are_made_once():
    compiled = InductorGlue("aot_eager")
    x = torch.zeros(1)
    first = compiled._numbers(ROW, x)
    assert [float(number) for number in first] == [40.0, -100.0, 155.0]
    assert compiled._numbers(ROW._replace(zero_point=7), x) is first
