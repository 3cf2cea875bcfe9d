"""The compiled glue gives the bits of plain PyTorch, whatever the layout and the threads."""

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from base.network import NormAct
from quant.integer import glue, glue_cpu
from quant.integer.glue import Row
from quant.integer.glue_build import ARGUMENTS

ROW = Row(17.3, -128.0, 127.0, 128)
# samples, channels, height, width, groups: 1 to 28 channels in a group, fewer and more pixels than
# 1024, channels that fill no vector, more threads than groups
SHAPES = [
    *[(2, 8 * depth, 6, 5, 8) for depth in (1, 2, 3, 4, 8, 12, 28)],
    *[(2, 4 * depth, 33, 32, 4) for depth in (1, 2, 3, 4, 8, 12, 28)],
    (1, 128, 4, 4, 32),
    (3, 32, 32, 32, 32),
    (1, 36, 41, 40, 3),
    (1, 6, 3, 1, 1),
    (5, 20, 3, 7, 20),
]


@pytest.fixture(scope="module", params=(1, 2, 3), ids="{} threads".format)
def compiled(request, glue_cache):
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", glue_cache)
        torch.set_num_threads(request.param)
        made = glue_cpu.load()
        if not isinstance(made, glue_cpu.CompiledGlue):
            pytest.skip(made.about)
        yield made
        torch.set_num_threads(before)


def map_of(*shape):
    """Values of all sizes, channels_last."""
    x = torch.randn(shape) * 3 + torch.randn(shape[1], 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def norm_of(channels, groups, silu):
    norm = NormAct(channels, num_groups=groups, eps=1e-6, silu=silu).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    return norm


def same(found, expected):
    alike = found.dtype is expected.dtype and found.stride() == expected.stride()
    return alike and torch.equal(found, expected)


def check_norms(compiled, shape, groups):
    x, balance = map_of(*shape), torch.rand(shape[1], 1, 1) + 0.5
    for silu, with_added, with_film in itertools.product((True, False), repeat=3):
        norm = norm_of(shape[1], groups, silu)
        added = torch.randn(shape[0], shape[1]) if with_added else None
        film = torch.randn(shape[0], 2 * shape[1]).chunk(2, 1) if with_film else None
        expected = norm(x, added, film)
        assert same(compiled.norm_act(x, norm, added, film), expected)
        for row in (ROW, ROW._replace(balance=balance)):
            codes = compiled.norm_act_quantize(x, norm, row, added, film)
            assert same(codes, glue.quantize(expected, row))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(compiled, shape):
    check_norms(compiled, shape[:4], shape[4])


def test_norms_are_compiled(compiled):
    assert compiled.about.startswith("compiled for AVX") and compiled.same_norms
    check_norms(compiled, (2, 128, 32, 32), 32)
    assert compiled.fused[128, 32, True] is not None


def test_where_norms_differ_only_what_follows_is_compiled(compiled):
    check_norms(compiled, (2, 48, 5, 5), 4)
    compiled.fused[48, 4, False] = None
    check_norms(compiled, (2, 48, 5, 5), 4)


def operands():
    x = map_of(2, 24, 6, 5)
    tokens = map_of(2, 36, 4, 3).flatten(2)  # (N, C, L): q, k, v of three heads
    heads = tokens.transpose(1, 2).unflatten(2, (3, 12)).transpose(1, 2)
    yield from {
        "map": x,
        "slice": x[:, 8:20],
        "other layout": x.contiguous(),
        "rows": torch.randn(3, 7, 20),
        "q": tokens[:, 12:24].transpose(1, 2),
        "heads": heads,
        "part of heads": heads[..., 4:8],
        "every second": torch.randn(4, 10)[:, ::2],
        "one pixel": map_of(3, 5, 1, 1),
        "many": map_of(1, 24, 64, 47),
        "many rows": map_of(1, 24, 64, 47)[:, 3:23],
        "vector": torch.randn(70001),
        "double": torch.randn(3, 5).double(),
    }.items()


@pytest.mark.parametrize("name, x", list(operands()), ids=lambda v: v if isinstance(v, str) else "")
def test_codes(compiled, name, x):
    balances = [None]
    if x.dim() == 4:
        balances.append(torch.rand(x.shape[1], 1, 1) + 0.5)
    balances.append(torch.rand(x.shape[-1]) + 0.5)
    for balance in balances:
        row = ROW._replace(balance=balance)
        assert same(compiled.quantize(x, row), glue.quantize(x, row))
        assert same(compiled.integers(x, row), glue.integers(x, row))


def test_codes_of_ties_and_far_values(compiled):
    x = torch.tensor([0.25, 0.75, -0.25, -0.75, 1.0, 1e30, -1e30, torch.inf] * 5)
    row = Row(2.0, -3.0, 4.0, 3)
    assert compiled.quantize(x, row)[:8].tolist() == [3, 5, 3, 1, 5, 7, 0, 7]
    wide = Row(2.0**16, 0.0, 65535.0, 0)  # as softmax outputs have
    x = torch.rand(99)
    assert same(compiled.integers(x, wide), glue.integers(x, wide))


@pytest.mark.parametrize("shape", [(2, 20, 33, 32), (2, 5, 20), (2, 20, 4, 1)], ids=str)
def test_sums_are_rescaled(compiled, shape):
    channels = shape[1] if len(shape) == 4 else shape[-1]
    acc = torch.randint(-(2**20), 2**20, shape).float()
    sums = torch.randint(-999, 999, (shape[0], 1, *shape[2:])).float()
    if len(shape) == 4:
        acc = acc.contiguous(memory_format=torch.channels_last)
    else:
        sums = torch.randint(-999, 999, (*shape[:-1], 1)).float()
    shifts, scale = torch.randint(-128, 128, (channels,)).float(), torch.rand(channels)
    for bias in (None, torch.randn(channels)):
        expected = glue.rescale(acc.clone(), sums, shifts, scale, bias)
        given = acc.clone()
        assert same(compiled.rescale(given, sums, shifts, scale, bias), expected)
        assert torch.equal(given, expected)


def test_softmax_is_compiled(compiled):
    assert "softmax" not in compiled.about
    assert compiled.softmax_quantize(torch.zeros(2, 4), 1.0, ROW).tolist() == [[132] * 4] * 2


def test_it_brings_no_threads_of_its_own(compiled):
    content = Path(compiled.library._name).read_bytes()
    assert b"libtorch_cpu" in content and b"libgomp" not in content and b"libomp" not in content


def test_it_is_copied_by_loading_it_again(compiled):
    assert pickle.loads(pickle.dumps(compiled)).about == compiled.about


def test_a_library_with_other_bits_is_refused():
    library = SimpleNamespace(**dict.fromkeys(ARGUMENTS, lambda *arguments: 0))
    with pytest.raises(ValueError, match="gives other bits"):
        glue_cpu.CompiledGlue(library)


def test_plain_pytorch_on_request_and_where_nothing_can_be_compiled(monkeypatch):
    assert glue_cpu.load(compiled=False).about == "plain PyTorch"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    made = glue_cpu.load()
    assert made.about == (
        "plain PyTorch: PyTorch uses DEFAULT here, the glue knows AVX2 and AVX512"
    )
    assert made.quantize is glue.quantize and made.norm_act is glue.norm_act


def test_on_a_processor_with_avx2(glue_cache):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("no AVX512 here, so that the other tests are this one")
    code = (
        "import test_glue_cpu as t; made = t.glue_cpu.load(); print(made.about)\n"
        "for shape in t.SHAPES[::4]: t.check_norms(made, shape[:4], shape[4])"
    )
    own = {"ATEN_CPU_CAPABILITY": "avx2", "XDG_CACHE_HOME": glue_cache}
    own["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "compiled for AVX2", done.stderr
