"""The compiled softmax gives the bits of plain PyTorch, whatever the length of rows and the
threads."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quant.integer import glue, glue_build, glue_softmax
from quant.integer.glue import Row

ROW = Row(255.0, -3.0, 252.0, 3)
# fewer elements than a thread is worth and more, rows that no number of threads divides
SHAPES = [(2, 3, 5, 7), (1, 1), (13,), (3, 70, 257), (37, 1000), (2, 4096), (7, 8, 64, 64)]


@pytest.fixture(scope="module", params=(1, 2, 3), ids="{} threads".format)
def compiled(request, glue_cache):
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", glue_cache)
        torch.set_num_threads(request.param)
        try:
            library = glue_build.library()
        except (OSError, ValueError) as error:
            pytest.skip(str(error))
        yield glue_softmax.CompiledSoftmax(library)
        torch.set_num_threads(before)


def check(compiled, scores):
    kept = scores.clone()
    for factor in (1, 0.125, -3.7):
        for row in (ROW, glue_softmax.EXACT):
            found = compiled.integers(scores, factor, row)
            expected = glue.softmax_integers(scores, factor, row)
            assert found.dtype is torch.float32 and found.stride() == expected.stride()
            assert torch.equal(found, expected)
        codes = compiled.quantize(scores, factor, ROW)
        assert codes.dtype is torch.uint8
        assert torch.equal(codes, glue.softmax_quantize(scores, factor, ROW))
    assert torch.equal(scores, kept)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(compiled, shape):
    assert compiled.same
    check(compiled, torch.randn(shape) * 10 ** (4 * torch.rand(shape) - 2))


def test_lengths(compiled):
    for columns in range(1, 131):
        check(compiled, torch.randn(3, columns) * torch.tensor([0.1, 3.0, 100.0])[:, None])


def test_codes_known_beforehand(compiled):
    scores = torch.full((2, 4), 9.0)
    scores[1, 2:] = -torch.inf
    codes = compiled.quantize(scores, 0.5, Row(10.0, -1.0, 4.0, 1))
    assert codes.tolist() == [[3, 3, 3, 3], [5, 5, 1, 1]]


def test_rows_without_a_largest_value(compiled):
    scores = torch.randn(5, 40)
    scores[0], scores[1, 3], scores[2, 39] = -torch.inf, torch.inf, torch.nan
    given = scores, 0.5, ROW
    expected = glue.softmax_integers(*given)
    assert expected.isnan().any(1).tolist() == [True, True, True, False, False]
    assert torch.equal(compiled.integers(*given).nan_to_num(), expected.nan_to_num())


def test_plain_pytorch_does_the_rest(compiled):
    scores = torch.randn(3, 4, 20)
    balanced = ROW._replace(balance=torch.rand(20) + 0.5)
    for given in (scores.mT, scores[..., 1:], scores.double(), scores[:0], scores[0, 0, 0]):
        assert torch.equal(compiled.quantize(given, 2, ROW), glue.softmax_quantize(given, 2, ROW))
    found = compiled.integers(scores, 2, balanced)
    assert torch.equal(found, glue.softmax_integers(scores, 2, balanced))


def test_a_library_with_other_bits_is_not_used():
    made = glue_softmax.CompiledSoftmax(SimpleNamespace(glue_softmax=lambda *arguments: 0))
    assert not made.same
    assert made.quantize(torch.zeros(4), 1.0, ROW).tolist() == [67] * 4


def test_on_a_processor_with_avx2(glue_cache):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("no AVX512 here, so that the other tests are this one")
    code = (
        "import test_glue_softmax as t, torch\n"
        "made = t.glue_softmax.CompiledSoftmax(t.glue_build.library())\n"
        "print(t.glue_build.capability(), made.same)\n"
        "for shape in t.SHAPES: t.check(made, torch.randn(shape))\n"
        "t.test_lengths(made)"
    )
    own = {"ATEN_CPU_CAPABILITY": "avx2", "XDG_CACHE_HOME": glue_cache}
    own["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "AVX2 True", done.stderr
