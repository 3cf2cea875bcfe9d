"""The CUDA engine without a GPU: where its tensors lie and what it asks of the kernel. What the
kernel computes is in test_triton_kernels.py."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="comes with PyTorch for CUDA")

from quant.integer import triton_kernels  # noqa: E402
from quant.integer.cuda import DEEPEST, CudaEngine, cuda_engine, self_test  # noqa: E402
from quant.integer.cuda_graph import GraphedCall  # noqa: E402

HOW = (2, 2), (1, 1), (1, 1)


class Watch(TorchDispatchMode):
    """Notes the operators that run, and refuses tensors that are not on the GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        leaves = [leaf for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf)]
        assert all(leaf.device.type == "cuda" for leaf in leaves), function
        return out


@pytest.fixture
def gpu(monkeypatch):
    """Tensors on "cuda" that hold nothing; -> the operators that ran on them."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with FakeTensorMode(), Watch() as watch:
        yield watch


@pytest.fixture
def engine(gpu):
    """An engine that keeps what it is asked to launch in `launched`."""
    engine = CudaEngine("cuda")
    engine.launched = []
    engine.launch = lambda *given: engine.launched.append(given)
    return engine


def test_convolutions_stay_on_the_gpu_and_are_channels_last(engine, gpu):
    weight = torch.empty(40, 70, 3, 3, dtype=torch.int8, device="cuda")
    product = engine.conv(weight, *HOW)
    codes = torch.empty(4, 70, 16, 15, dtype=torch.uint8, device="cuda")
    codes = codes.contiguous(memory_format=torch.channels_last)
    scale, bias = torch.empty(2, 40, device="cuda").unbind()
    gpu.names.clear()
    out = product(codes, 7, scale, bias)
    assert out.shape == (4, 40, 8, 8) and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    # neither copies nor numbers brought to the device or from it
    assert set(gpu.names) <= {"permute", "view", "_unsafe_view", "new_empty", "detach", "device"}

    (given,) = engine.launched
    pixels, borders, packed, sums, zero_point, *_ = given
    assert pixels.shape == (4, 16, 15, 70) and pixels.dtype == borders.dtype == torch.int8
    assert packed.shape == (40, 9 * 128) and sums.shape == (40,)  # 70 channels in blocks of 64
    assert zero_point is engine.zero_points[7] and zero_point.shape == ()
    assert given[8].shape == (4 * 8 * 8, 40)


def test_linear_products_are_rows_of_single_pixels(engine):
    product = engine.linear(torch.empty(24, 10, dtype=torch.int8, device="cuda"))
    codes = torch.empty(2, 5, 10, dtype=torch.uint8, device="cuda")
    zero_point = torch.empty((), dtype=torch.int32, device="cuda")
    residual = torch.empty(2, 5, 24, device="cuda")
    assert product(codes, zero_point, residual[0, 0], None, residual).shape == (2, 5, 24)
    (given,) = engine.launched
    assert given[0].shape == (10, 1, 1, 10) and given[2].shape == (24, 32)
    assert given[4] is zero_point and given[6] is None
    assert given[7].numel() == 2 * 5 * 24 and given[8].shape == (10, 24)


def test_weights_are_brought_to_the_device_of_the_engine(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    launched = []
    with FakeTensorMode():
        engine = CudaEngine("cuda:1")
        engine.launch = lambda *given: launched.append(given)
        product = engine.linear(torch.empty(3, 4, dtype=torch.int8))
        codes = torch.empty(2, 4, dtype=torch.uint8, device="cuda:1")
        product(codes, 0, torch.empty(3, device="cuda:1"), None)
    tensors = [value for value in launched[0] if torch.is_tensor(value)]
    assert {str(value.device) for value in tensors} == {"cuda:1"}


def test_packed_weights_hold_each_taps_channels_and_zeros():
    weight = torch.arange(-12, 12, dtype=torch.int8).reshape(2, 3, 2, 2)
    packed, sums = CudaEngine("cpu")._packed(weight)
    taps = packed.reshape(2, 2, 2, 32)
    assert torch.equal(taps[..., :3], weight.permute(0, 2, 3, 1)) and not taps[..., 3:].any()
    assert sums.tolist() == [sum(range(-12, 0)), sum(range(12))] and sums.dtype == torch.int32


def test_sums_that_pass_int32_are_refused(engine):
    engine.linear(torch.empty(1, DEEPEST, dtype=torch.int8, device="cuda"))
    with pytest.raises(ValueError, match=f"sums {DEEPEST + 1} products for each output"):
        engine.linear(torch.empty(1, DEEPEST + 1, dtype=torch.int8, device="cuda"))


def test_an_engine_that_differs_or_does_not_run_is_not_used(monkeypatch):
    monkeypatch.setattr(triton_kernels, "launch", lambda *given: given[8].zero_())
    assert self_test("cpu").startswith("the integer kernel on cpu differs from its definition (")
    assert cuda_engine("cpu") == self_test("cpu")

    def broken(*given):
        raise OSError("no compiler\nat all")

    monkeypatch.setattr(triton_kernels, "launch", broken)
    assert self_test("cpu") == "the integer kernel does not run on cpu: no compiler"


def test_older_gpus_are_told_apart_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda_engine("cuda:0") == (
        "cuda:0 has compute capability 7.5; integer products need 8.0 or more"
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_engine_is_exact_and_a_graph_reads_other_zero_points():
    engine = cuda_engine("cuda")
    assert isinstance(engine, CudaEngine), engine
    rng = torch.Generator("cuda").manual_seed(0)
    codes = torch.randint(0, 256, (4, 64, 8, 8), generator=rng, device="cuda").to(torch.uint8)
    weight = torch.randint(-8, 8, (32, 64, 3, 3), generator=rng, device="cuda").to(torch.int8)
    scale, bias = torch.rand(2, 32, generator=rng, device="cuda")
    product = engine.conv(weight, (1, 1), (1, 1), (1, 1))
    zero_point = torch.zeros((), dtype=torch.int32, device="cuda")
    graphed = GraphedCall(lambda codes: product(codes, zero_point, scale, bias))
    for number in (0, 3, 255):
        zero_point.fill_(number)
        assert torch.equal(graphed(codes), product(codes, number, scale, bias))
    assert graphed.trouble == "" and len(graphed.recordings) == 1
