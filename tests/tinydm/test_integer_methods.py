"""The models that ship on integers by the rules of every method: the bits of their simulation.

    PYTHONPATH=. python tests/tinydm/test_integer_methods.py

tries all methods on all models at both widths, minutes; the tests try one method of each structure.
Ranges are those of a few samples, what passes learn besides is random."""

import time
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch

import quant
from base.config import load
from base.files import PROJECT
from base.network import Matmul
from models.diffusion import load_model
from quant.integer.select import integer_net
from quant.integer.support import why_by_rules
from quant.network import Bypass, in_channels_last, quant_layers, stem_of
from quant.passes.run import check_passes
from quant.rules import resolve, role_of
from quant.timeline import Timeline
from tinydm.recipe import RunConfig, boundaries, network_times
from tinydm.report.integers import MODELS, network_of

BITS = "w4a8", "w4a4"
METHODS = sorted(path.stem for path in (PROJECT / "configs/method").glob("*.yaml"))
WORDS = ["sampling.steps=4", "calibration.steps=4", "effort.dtype=fp32"]
# how ranges are found makes no difference to what a grid is, and so they are found fastest
FAST = {"match": "*", "weight": {"range": "minmax"}, "input": {"range": "minmax", "ema": 0.0}}
FEW = "multimodel", "qdiffusion", "tfmq_as_released", "tinydm"
# one method of each structure -> the others
ALIKE = {
    "apqdm": [],
    "edadm": ["qdrop"],
    "edadm_as_released": [],
    "multimodel": [],
    "multimodel_as_released": [],
    "ptq4dm_as_released": [],
    "ptqd_as_released": [],
    "qdiffusion": ["minmax", "mixed", "ptqd", "ptqd_mixed"],
    "qdiffusion_as_released": [],
    "tdq": [],
    "tfmq": [],
    "tfmq_as_released": [],
    "tinydm": ["tinydm_auto", "tinydm_mixed"],
    "uniform": ["di2n", "i2n", "ptq4dm"],
}
FLOATS = ["apqdm_as_released"]  # what it quantizes has a scale for every channel


def configured(model, bits, method):
    names = f"model/{model}", f"bits/{bits}", f"method/{method}", "preset/demo"
    return load(RunConfig, [PROJECT / f"configs/{name}.yaml" for name in names], WORDS)


def structure(net, config):
    """What the arithmetic of a method depends on."""
    specs = []
    for name, m in net.named_modules():
        for role in getattr(m, "roles", [role_of(m)]):
            facts = resolve(
                config.all_rules, name, role, "matmul" if isinstance(m, Matmul) else "layer"
            )
            if role:
                parts = [replace(facts[part], range="", ema=0.0) for part in ("weight", "input")]
                specs.append([name, role, *parts, facts["split"], facts["balance"]])
    passes = dict(check_passes(config.all_passes))
    return specs, boundaries(config), "bypass_input" in passes


def test_every_method_has_the_structure_of_one_that_is_tried():
    assert sorted([*ALIKE, *FLOATS, *sum(ALIKE.values(), [])]) == METHODS
    net = network_of("latent-compact")
    found = {m: structure(net, configured("latent-compact", "w4a4", m)) for m in METHODS}
    for method, others in ALIKE.items():
        assert all(found[other] == found[method] for other in others), method
    for method in FLOATS:
        rules = configured("latent-compact", "w4a4", method).all_rules
        assert all(why_by_rules(net, rules).values())


def hardened(model, config):
    """The network by a method's rules, fitted to two samples of each of four steps; with random
    factors of channels and a random bypass where the method has them."""
    net = quant.convert(model.net, [*config.all_rules, FAST], Timeline(boundaries(config)))
    rng = torch.Generator().manual_seed(0)
    for layer in quant_layers(net).values():
        if layer.inverse_balance is not None:
            layer.balance(torch.rand(layer.shape[1], generator=rng) + 0.5)
    t = torch.tensor(network_times(config)).repeat_interleave(2)
    rows = model.labels(0, range(2))
    which = None if rows is None else torch.arange(len(t)) % 2
    samples = quant.CalibrationSet(model.noise(0, range(len(t))).draw(), t, rows, which)
    passes = [{"fit_ranges": {}}]
    if any(rule.get("weight", {}).get("per_segment") for rule in config.all_rules):
        passes = [{"segment_models": {"passes": passes}}]
    net, _ = quant.run_passes(net, passes, model.net, samples, model=model, log=lambda line: None)
    if "bypass_input" in dict(check_passes(config.all_passes)):
        assert stem_of(net) is not None
        net.bypass = Bypass(net.timeline, model.shape[0], model.shape[0])
        net.bypass.gain.copy_(torch.randn(net.bypass.gain.shape, generator=rng))
    return net


def is_equal(model, bits, method):
    """Whether the network on integers gives the bits of its simulation to two samples at two of the
    sampler's times, and how many layers run so."""
    config = configured(model, bits, method)
    model = load_model(asdict(config), device="cpu")
    net = in_channels_last(hardened(model, config))
    x, labels = model.noise(1, range(2)).draw(), model.labels(1, range(2))
    times = network_times(config)
    given = [model.network_inputs(x, torch.full((2,), t), labels) for t in (times[0], times[-1])]
    integer = integer_net(net, given[0])
    count = len(integer.integer_layers)
    too_wide = sum("overflow" in why for why in integer.reasons.values())  # without VNNI
    by_rules = sum(not why for why in why_by_rules(model.net, config.all_rules).values())
    assert count + too_wide == by_rules
    return all(torch.equal(integer(*one), net(*one)) for one in given), count


@pytest.mark.parametrize(
    "model, method",
    [("latent-compact", method) for method in ALIKE]
    + [(model, method) for model in ("cifar10-compact", "latent-compact-class") for method in FEW],
)
def test_shipped_model_gives_the_bits_of_its_simulation(model, method):
    bits = BITS[(len(model) + len(method)) % 2]  # each of them often
    assert is_equal(model, bits, method)[0]


if __name__ == "__main__":
    for case in product(MODELS, BITS, [m for m in METHODS if m not in FLOATS]):
        started = time.process_time()
        equal, count = is_equal(*case)
        seconds = time.process_time() - started
        print(*case, f"{count} layers", "equal" if equal else "DIFFERENT", f"{seconds:.1f} s")
