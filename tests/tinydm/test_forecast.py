"""What a run is going to take, with rates that are known."""

from dataclasses import asdict

import pytest
import torch
from pipeline import NETWORK, WORDS, files

from models.diffusion import example_arguments
from models.zoo import build_network
from quant.graph import trace
from quant.reconstruction.estimate import Costs, Rates
from quant.reconstruction.trial import Trial
from tinydm import forecast
from tinydm.forecast import Bench, spoken
from tinydm.recipe import load_recipe

SECOND = 1e-6  # of a multiply-add


def network():
    with torch.device("meta"):
        return build_network(**NETWORK)


def foretold(model, monkeypatch, *words, method="qdiffusion", measure=None):
    """The forecast, and the network's seconds for a sample, where each multiply-add takes SECOND
    and nothing else takes time."""
    one = Costs([(1.0, 0.0, 0.0, 0.0)], [SECOND], 1)
    rates = Rates({"weight": one, "input": one, "joint": one}, one, one, 16, 64)
    monkeypatch.setattr(forecast, "measured_rates", measure or (lambda *given: rates))
    monkeypatch.setattr(forecast, "timed", lambda call, device: call() or 0.0)
    config = load_recipe(files(model, method=method), [*WORDS, *words, "out=none"])
    net = network()
    graph = trace(net, example_arguments(asdict(config), net))
    samples = config.calibration.steps * config.calibration.images
    found = forecast.forecast(config, net, graph, samples, 0.0)
    return found, sum(graph.macs.values()) * SECOND


def test_the_stages_take_what_their_forward_passes_and_steps_take(pixel_model, monkeypatch):
    found, sample = foretold(pixel_model, monkeypatch)
    # 6 images in 2 batches of 4 at 4 steps; 24 samples pass once to be observed; both networks
    # over 24 samples, twice each of two phases over 24, 4 and 2 steps of 16
    assert found.seconds == pytest.approx(
        {
            "calibrate": 8 * 4 * sample,
            "fit_ranges": 24 * sample,
            "reconstruct": (2 * 24 + 4 * 24 + (4 + 2) * 16) * sample,
        }
    )
    assert not found.uncounted
    assert str(found).startswith(f"time: about {spoken(sum(found.seconds.values()))} (calibrate ")


def test_networks_for_parts_of_the_steps_share_the_samples(pixel_model, monkeypatch):
    found, sample = foretold(pixel_model, monkeypatch, "segments=3", method="multimodel")
    # three networks of 8 samples each
    assert found.seconds["reconstruct"] == pytest.approx(
        3 * (2 * 8 + 4 * 8 + (4 + 2) * 16) * sample
    )
    assert found.seconds["fit_ranges"] == pytest.approx(3 * 8 * sample)


def test_what_is_not_counted_is_named(pixel_model, monkeypatch):
    words = "calibration.file=mine", "pass_options.reconstruct.frequency=0"
    found, sample = foretold(pixel_model, monkeypatch, *words, method="tinydm")
    assert found.seconds["calibrate"] == 0
    # 4 steps of 16 through the full-precision network and thrice the other; errors of 256
    assert found.seconds["finetune"] == pytest.approx((4 * 16 * 4 + 2 * 256 * 2) * sample)
    assert {"balance", "correct_noise"} <= set(found.uncounted)
    assert not set(found.uncounted) & found.seconds.keys()
    assert ", balance not counted" in str(found)


def test_units_are_measured_with_random_weights(pixel_model, monkeypatch):
    """For real: without a checkpoint, on every kind of unit, in batches of bounded work."""
    sizes = []
    seconds = Trial.seconds

    def note(trial, phase, objective, schedule, steps):
        sizes.append(schedule.batch_size)
        assert seconds(trial, phase, objective, schedule, steps) >= 0
        return 0.001

    monkeypatch.setattr(Trial, "seconds", note)
    monkeypatch.setattr(forecast, "MACS", 3 * 10**6)
    measure = forecast.measured_rates
    found, sample = foretold(pixel_model, monkeypatch, "checkpoint=nowhere", measure=measure)
    most = max(trace(n := network(), example_arguments({}, n)).work.values())
    assert set(sizes) == {3 * 10**6 // most} and found.memory > 2**27
    assert all(seconds >= 0 for seconds in found.seconds.values())


def test_memory_holds_both_networks_and_a_step(pixel_model, monkeypatch):
    class Known(Bench):
        def __init__(self):
            self.bytes, self.graph, self.config = 1000, graph, config
            self.schedule, self.rates = config.effort, Rates({}, None, None, 16, 64)

    net = network()
    config = load_recipe(files(pixel_model), [*WORDS, "out=none", "effort.batch_size=100"])
    graph = trace(net, example_arguments(asdict(config), net))
    largest = max(graph.by_unit(graph.operands).values())
    assert Known().memory() == 2000 + 4 * 100 * largest * forecast.STEP_HOLDS


def test_times_are_said_in_the_unit_that_suits_them():
    assert [spoken(s) for s in (0.4, 599, 600, 7100, 7200)] == [
        "0 s",
        "599 s",
        "10 min",
        "118 min",
        "2 h",
    ]
