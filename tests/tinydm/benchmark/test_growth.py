"""How calibration grows: a tiny network walked through, and lines whose slopes are known."""

import json

import pytest
import yaml
from conftest import TINY

from base.config import load
from tinydm import cli
from tinydm.benchmark import growth
from tinydm.benchmark.growth import GrowthConfig, check, measure, random_model, recipe_of
from tinydm.benchmark.growth_chart import Walk, line_through, over_samples, straightness


@pytest.fixture
def network(tmp_path):
    schedule = {"kind": "linear", "timesteps": 1000}
    content = {"name": "tiny", "network": TINY, "schedule": schedule}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return f"network={tmp_path}/tiny.yaml"


def test_every_unit_has_an_end_and_its_multiply_adds(network):
    recipe = recipe_of(load(GrowthConfig, [], [network, "iters=1", "batch_size=2"]))
    walk = measure(recipe, 3)
    assert walk.samples == 3 and len(walk.units) == len(walk.seconds) == len(walk.macs) > 5
    assert walk.seconds == sorted(walk.seconds) and walk.seconds[0] > 0
    net = random_model(recipe).net
    # the first layer: 3 to ch channels, a kernel of 3 x 3, at every pixel
    stem = net.conv_in
    pixels = net.image_size**2
    counts = dict(zip(walk.units, walk.macs))
    assert counts["conv_in"] == stem.in_channels * stem.out_channels * 9 * pixels
    assert walk.gigamacs[-1] == pytest.approx(sum(walk.macs) / 1e9)


def test_lines_of_least_squares():
    assert line_through([1, 2, 3], [3.0, 5.0, 7.0]) == pytest.approx((2, 1, 1))
    assert line_through([1, 2, 3], [4.0, 4.0, 4.0]) == pytest.approx((0, 4, 1))
    # y = 0, 0, 3 over 0, 1, 2: slope 1.5, offset -0.5, left over 1.5 of 6
    assert line_through([0, 1, 2], [0.0, 0.0, 3.0]) == pytest.approx((1.5, -0.5, 0.75))


def test_how_straight_is_said_of_the_most_samples():
    macs = [10**9, 10**9, 2 * 10**9]
    few, many = (
        Walk(n, ["a", "b", "c"], [s, 2 * s, 4 * s], macs, {"capture": s, "errors": 1.0})
        for n, s in [(8, 2.0), (16, 3.0)]
    )
    del few.parts["errors"]
    # 8 s at 8 samples, 12 at 16
    assert straightness([many, few]) == (
        "over multiply-adds R² 1.000, over units R² 0.964 at 16 samples; over samples R² 1.000: "
        "4.0 s + 0.50 s a sample"
    )
    assert over_samples([many, few]) == {
        "all": ([8, 16], [8.0, 12.0]),
        "capture": ([8, 16], [2.0, 3.0]),
    }


def test_the_command_leaves_numbers_and_a_picture(network, tmp_path, capsys):
    words = ["samples=[2,3]", "iters=1", "batch_size=2", f"out={tmp_path}/out"]
    cli.main(["benchmark", "growth", network, *words])
    found = json.loads((tmp_path / "out/growth.json").read_text())
    assert [walk["samples"] for walk in found["walks"]] == [2, 3]
    assert found["machine"]["threads"] == 1 and found["asked"]["iters"] == 1
    assert (tmp_path / "out/calibration-growth.png").read_bytes().startswith(b"\x89PNG")
    assert "over multiply-adds R²" in capsys.readouterr().out


@pytest.mark.parametrize(
    "word, said",
    [
        ("iters=0", "iters is 0; it must be at least 1"),
        ("samples=[8,8]", r"samples is \[8, 8\]; name two numbers"),
        ("sampels=[8]", "did you mean 'samples'"),
        ("network=imagenet", "imagenet is no network without a condition"),
        ("network=cifar1O", "no model is called 'cifar1O'; did you mean 'cifar10'"),
    ],
)
def test_mistakes_are_told_before_any_work(word, said, monkeypatch):
    monkeypatch.setattr(growth, "measure", None)
    with pytest.raises(ValueError, match=said):
        growth.run([word])
    check(GrowthConfig())
