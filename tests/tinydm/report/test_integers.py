"""The table of what every method runs on int8."""

from quant.integer.support import why_by_rules
from tinydm.report import integers
from tinydm.report.integers import integers_block, network_of, rules_of
from tinydm.report.reference import method_names


def test_a_row_for_each_method_with_counts_of_layers_and_reasons(monkeypatch):
    monkeypatch.setattr(integers, "MODELS", ["latent-compact"])
    monkeypatch.setattr(
        integers, "method_names", lambda: ["qdiffusion", "tfmq", "tfmq_as_released"]
    )
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in integers_block()
    )
    assert head[1:] == ["latent-compact", "what stays as defined, and why"]
    assert rows[0] == ["[`qdiffusion`](methods.md#qdiffusion)", "49 of 49", "–"]
    assert rows[1][1:] == ["42 of 49", "stem, skip, out: not quantized"]
    assert rows[2][2].endswith("not quantized; temb: its input is not quantized")


def test_it_is_the_same_at_w4a4():
    nets = [network_of(model) for model in integers.MODELS]
    for method in method_names():
        wide, narrow = (rules_of(bits, method) for bits in ("w4a8", "w4a4"))
        for net in nets:
            assert why_by_rules(net, wide) == why_by_rules(net, narrow), method
