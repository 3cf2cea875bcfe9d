import pytest
import torch
from torch import nn

from base.hooks import watching


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))


def hooks_of(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_outputs_are_seen_in_the_order_of_the_pass():
    net, x, seen = network(), torch.ones(4, 2), []
    names = ["1.1", "", "0"]
    notes = {name: lambda m, i, o, name=name: seen.append((name, m, i, o)) for name in names}
    with watching(net, notes):
        y = net(x)
    assert [name for name, *_ in seen] == ["0", "1.1", ""]
    assert [module for _, module, *_ in seen] == [net[0], net[1][1], net]
    assert torch.equal(seen[0][2][0], x) and torch.equal(seen[0][3], net[0](x))
    assert torch.equal(seen[2][3], y)


def test_before_sees_the_inputs_alone_and_ahead_of_the_inner_modules():
    net, x, seen = network(), torch.ones(4, 2), []
    with watching(net, {n: lambda *a: seen.append(a) for n in ("1.0", "")}, before=True):
        net(x)
    assert [len(arguments) for arguments in seen] == [2, 2]
    assert [module for module, _ in seen] == [net, net[1][0]]


@pytest.mark.parametrize("before", [False, True])
def test_what_a_callback_returns_changes_nothing(before):
    net, x = network(), torch.ones(4, 2)
    expected = net(x)
    with watching(net, {"0": lambda *a: torch.full((4, 2), 7.0)}, before=before):
        assert torch.equal(net(x), expected)


def test_an_error_inside_leaves_no_hook():
    net = network()
    with pytest.raises(RuntimeError, match="stop"):
        with watching(net, {"0": print, "1": print}):
            assert hooks_of(net) == 2
            raise RuntimeError("stop")
    assert hooks_of(net) == 0


def test_an_unknown_name_hooks_nothing():
    net = network()
    with pytest.raises(AttributeError):
        with watching(net, {"0": print, "absent": print}):
            pass
    assert hooks_of(net) == 0
