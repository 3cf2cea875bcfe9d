"""Whether a network can run on integers, and what a trial sees."""

import pytest
import torch
from conftest import TINY
from integer_nets import arguments, hardened
from tiny import rules

from models.zoo import build_network
from quant.convert import convert
from quant.integer import select
from quant.integer.select import integer_net, trial
from quant.network import in_channels_last


@pytest.mark.parametrize("compiled", [False, True])
def test_integer_net_gives_the_bits_of_the_simulation(compiled, tmp_path):
    net = in_channels_last(hardened("pixel", tmp_path, rules(4, 8)))
    given = arguments("pixel")
    equal, factor = trial(net, integer_net(net, given, compiled=compiled), given)
    assert equal and factor > 0


def test_trial_sees_other_bits():
    given = (torch.ones(2, 3),)
    assert trial(torch.sin, torch.sin, given)[0]
    assert not trial(torch.sin, torch.cos, given)[0]


def test_a_network_that_cannot_is_refused_in_one_sentence(tmp_path, monkeypatch):
    net = hardened("pixel", tmp_path, rules(4, 32))
    given = arguments("pixel")
    with pytest.raises(ValueError, match="no layer .* can run on integers; .* is not quantized"):
        integer_net(net, given)
    with pytest.raises(ValueError, match="layers have no integer weights yet"):
        integer_net(convert(build_network(**TINY), rules(4, 8)), given)
    monkeypatch.setattr(select, "cpu_engine", lambda: "this is another processor")
    with pytest.raises(ValueError, match="no integer engine here: this is another processor"):
        integer_net(hardened("pixel", tmp_path, rules(4, 8)), given)
