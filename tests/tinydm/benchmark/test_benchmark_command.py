"""The command, on the tiny network with few rounds."""

import json

import pytest
import torch
import yaml
from conftest import TINY

from base.config import load
from base.files import PROJECT
from tinydm import cli
from tinydm.benchmark import command, harness
from tinydm.benchmark.command import BenchmarkConfig, check, timed_arithmetic
from tinydm.keys import describe_keys


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Of a short run, on a machine that nobody else uses."""
    monkeypatch.setattr(harness, "busy_elsewhere", lambda: 0.0)
    monkeypatch.setattr(harness, "ROUND", 0.0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"name": "tiny", "network": TINY}))
    return [
        f"networks=[{tmp_path}/tiny.yaml]",
        "batches=[1]",
        "rounds=3",
        "threads=1",
        "device=cpu",
        "only=[channels_last,simulated,published]",
        f"out={tmp_path}/out",
    ]


def test_a_run_leaves_lines_tables_and_charts(words, tmp_path, capsys):
    cli.main(["benchmark", *words, "steps=2"])
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "benchmark-size.png",
        "benchmark-speed.png",
        "benchmark.jsonl",
        "benchmark.md",
    ]
    forward, run = map(json.loads, (out / "benchmark.jsonl").read_text().splitlines())
    assert (forward["clean"], forward["rounds"], forward["failed"]) == (3, 3, {})
    quantized = ["published w4a8", "simulated w4a8", "simulated w8a8"]
    assert list(forward["seconds"]) == ["fp32", "channels_last", *quantized]
    assert list(run["seconds"]) == ["fp32", *quantized[1:]] and run["steps"] == 2
    assert all(0 < s < 1 for values in forward["seconds"].values() for s in values)
    page = (out / "benchmark.md").read_text()
    assert torch.backends.cpu.get_cpu_capability() in page and "Whole runs of 2 DDIM" in page
    assert "tiny b1; " in capsys.readouterr().out


def test_measured_again_a_line_takes_the_place_of_its_former(words, tmp_path, monkeypatch):
    lines = tmp_path / "out/benchmark.jsonl"
    command.run([*words, "only=[channels_last]"])
    elsewhere = json.loads(lines.read_text())
    elsewhere["machine"]["isa"] = "AVX10"
    lines.write_text(lines.read_text() + json.dumps(elsewhere) + "\n")
    command.run([*words, "only=[simulated]", "bits=[w8a8]"])
    other, own = map(json.loads, lines.read_text().splitlines())
    assert list(own["seconds"]) == ["fp32", "simulated w8a8"] and other == elsewhere
    busy = iter(range(10**6))
    monkeypatch.setattr(harness, "busy_elsewhere", lambda: 1e6 * next(busy))
    command.run([*words, "only=[simulated]", "seconds=0.001"])
    assert list(map(json.loads, lines.read_text().splitlines())) == [other, own]
    (tmp_path / "out/benchmark.md").unlink()
    command.run([*words, "networks=[]"])
    assert "AVX10" in (tmp_path / "out/benchmark.md").read_text()


def test_what_cannot_be_made_is_told_and_the_rest_measured(words, tmp_path, monkeypatch):
    def refuse(case, bits):
        raise ValueError(f"{bits} saturates")

    monkeypatch.setitem(command.variants.MAKERS, "published", refuse)
    command.run([*words, "only=[published]"])
    row = json.loads((tmp_path / "out/benchmark.jsonl").read_text())
    assert row["failed"] == {"published w4a8": "w4a8 saturates"} and list(row["seconds"]) == [
        "fp32"
    ]


@pytest.mark.parametrize(
    "word, said",
    [
        ("rounds=0", "rounds is 0; it must be above 0"),
        ("batches=[]", "batches are 1 or more"),
        ("only=[simulatd]", "variant 'simulatd' is unknown; did you mean 'simulated'"),
        ("networks=[cifar1O]", "no model is called 'cifar1O'; did you mean 'cifar10'"),
        ("bits=[w4]", "no bits is called 'w4'"),
        ("network=cifar10", "unknown key 'network'; did you mean 'networks'"),
    ],
)
def test_mistakes_are_told_before_any_work(word, said):
    with pytest.raises(ValueError, match=said):
        check(load(BenchmarkConfig, [], [word]))


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no results and networks is empty"):
        command.run(["networks=[]", f"out={tmp_path}"])


def test_arithmetic_is_put_back():
    threads, allowed = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    with timed_arithmetic(3):
        assert torch.get_num_threads() == 3 and not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == (threads, allowed)


def test_every_key_is_on_the_page_and_says_what_it_is():
    page = (PROJECT / "docs/configuration.md").read_text()
    for key, _, _, comment in describe_keys(BenchmarkConfig):
        assert f"| `{key}` |" in page and comment, key
