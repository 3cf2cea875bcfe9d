"""The report from synthetic run folders: everything inside one file, nothing outside it, absent
files named."""

import json
import re

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from tinydm.report.figures import draw_block_errors
from tinydm.report.page import template_environment, write_report
from tinydm.report.reading import number, read_run


def write_images(folder, num, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(num):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
            folder / f"{i:06d}.png"
        )


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, fd=3.25, count=256):
    write_images(folder / "samples", 9, 0)
    write_images(folder / "float", 9, 1)
    (folder / "config.yaml").write_text(
        "name: cifar10-compact\nbits: {weight: 4, input: 8}\nmethod: '<b>tinydm</b>'\n"
        "sampling: {sampler: ddim, steps: 20, num: 9, seed: 0}\nprovenance: {versions: {torch: "
        "'9.9'}}\n"
    )
    write_lines(
        folder / "passes.jsonl",
        [{"pass": "fit_ranges", "seconds": 1.5}]
        + [
            {
                "pass": "reconstruct",
                "phase": phase,
                "unit": f"down.{i}",
                "error_before": 0.1,
                "error_after": 0.02,
                "seconds": 2.0,
            }
            for phase in ("weight", "input")
            for i in range(3)
        ],
    )
    write_lines(
        folder / "stages.jsonl",
        [
            {"stage": stage, "seconds": seconds}
            for stage, seconds in (("calibrate", 10.0), ("quantize", 5.0), ("quantize", 7.0))
        ],
    )
    layer = {
        "role": "conv1",
        "kind": "conv2d",
        "weight_bits": 4,
        "input_bits": 8,
        "params": 100,
        "macs": 1000,
    }
    product = {
        "name": "qk",
        "role": "q+k",
        "kind": "matmul",
        "weight_bits": None,
        "input_bits": [8, 16],
        "params": 0,
        "macs": 5,
    }
    (folder / "map.json").write_text(
        json.dumps(
            {
                "layers": [*({"name": f"down.{i}.conv1", **layer} for i in range(2)), product],
                "params_share": 0.987,
                "macs_share": 0.5,
            }
        )
    )
    (folder / "metrics.json").write_text(
        json.dumps(
            {
                "protocol": {
                    "asked": {},
                    "scores": {
                        "count": count,
                        "reference": "cifar10 train",
                        "extractor_sha256": "abc",
                    },
                },
                "float": {"scores": {"FD-cifar-resnet": 2.125}},
                "quantized": {"scores": {"FD-cifar-resnet": fd}},
                "paired": {"psnr_db": 31.5, "ssim": 0.912, "count": 9},
                "sqnr_db_per_step": [
                    {"step": i, "t": 900 - i, "sqnr_db": db}
                    for i, db in enumerate((20.0, 30.0, None))
                ],
                "sizes": {"float_bytes": 4000, "quantized_bytes": 1000},
                "float_samples": "float",
            }
        )
    )
    return folder


def test_a_complete_run_shows_all_it_holds(tmp_path):
    page = write_report([make_run(tmp_path / "w4a8")], tmp_path / "report.html").read_text()
    for text in (
        "cifar10-compact",
        "4/8",
        "FD-cifar-resnet",
        "3.250",
        "float 2.125",
        "31.500",
        "0.912",
        "25.000",
        "4.00×",
        "22.0",
        "98.7%",
        "50.0%",
        "down.1.conv1",
        "8/16",
        "protocol.scores.count",
        "provenance.versions.torch",
    ):
        assert text in page, text
    assert page.count("data:image/png") == 2 and page.count("data:image/svg+xml") == 2
    assert "not there yet" not in page


def test_a_comparison_comes_first_even_without_runs(tmp_path):
    part = (
        "tiny, 500 images",
        ["Method", "PSNR dB", "Note"],
        [["min<max", "30.1 ± 0.2", ""], ["other", "–", "needs a"]],
    )
    page = write_report([], tmp_path / "report.html", comparison=[part]).read_text()
    assert "Protocol: tiny, 500 images." in page and "min&lt;max" in page and "needs a" in page
    assert '<td class="number">30.1 ± 0.2</td>' in page and page.index("Comparison") < page.index(
        "What was run"
    )


def test_numbers_stand_right_and_text_left_and_text_is_escaped():
    source = "{% from 'parts.html.j2' import table %}{{ table(head, rows, ['text', 'number']) }}"
    rows = [["x", 1.5], ["<y> & z", {"value": 2, "small": "<s>"}], ["", None]]
    page = template_environment().from_string(source).render(head=["a", "b"], rows=rows)
    assert re.findall('<th scope="col" class="(.*?)">(.*?)</th>', page) == [
        ("text", "a"),
        ("number", "b"),
    ]
    assert re.findall("<tr>(<td.*?)</tr>", page) == [
        '<td class="text">x</td><td class="number">1.500</td>',
        '<td class="text">&lt;y&gt; &amp; z</td><td class="number">2<small>&lt;s&gt;</small></td>',
        '<td class="text"></td><td class="number">–</td>',
    ]


def test_a_name_that_a_template_misspells_is_an_error():
    with pytest.raises(UndefinedError, match="'runz' is undefined"):
        template_environment().from_string("{{ runz }}").render(runs=[])


def test_numbers_for_a_reader():
    values = (None, 1234567, 1234.5678, 0.5, 0.0012345, 0.0, float("inf"), True, "x")
    shown = ["–", "1,234,567", "1,234.568", "0.5", "0.00123", "0.000", "inf", "True", "x"]
    assert [number(value) for value in values] == shown and number(2.25, 1) == "2.2"


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    page = write_report([make_run(tmp_path / "run")], tmp_path / "report.html").read_text()
    assert not re.search(r"""(?:href|src)=["'](?!data:)""", page) and "url(" not in page
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_text_of_a_run_is_escaped(tmp_path):
    page = write_report([make_run(tmp_path / "a & $b")], tmp_path / "report.html").read_text()
    assert "&lt;b&gt;tinydm&lt;/b&gt;" in page and "<b>" not in page and "a &amp; $b" in page


def test_an_empty_run_names_every_command(tmp_path):
    (tmp_path / "run").mkdir()
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    for script in ("calibrate", "quantize", "sample", "evaluate"):
        assert f"python scripts/{script}.py" in page


def test_scores_of_different_counts_never_share_a_column(tmp_path):
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b"),
        make_run(tmp_path / "c", fd=9.5, count=512),
    ]
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert (
        page.count("FD-cifar-resnet<small>") == 2 and "512 images" in page and "256 images" in page
    )


def test_the_same_runs_give_the_same_bytes_and_no_part_is_left(tmp_path):
    run = make_run(tmp_path / "run")
    first = write_report([run], tmp_path / "report.html").read_bytes()
    assert write_report([run], tmp_path / "report.html").read_bytes() == first
    assert not list(tmp_path.glob("*.part"))


def test_without_float_images_the_quantized_ones_are_shown_alone(tmp_path):
    run = make_run(tmp_path / "run")
    for path in (run / "float").iterdir():
        path.unlink()
    page = write_report([run], tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 1 and "precision=float" in page


def test_broken_json_and_absent_folders_are_said_in_a_sentence(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="metrics.json is not valid JSON.*scripts/evaluate.py"):
        write_report([run], tmp_path / "report.html")
    with pytest.raises(ValueError, match="does not exist"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="name at least one"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_layers_of_one_kind_are_counted_together_and_all_are_folded(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run["groups"] == [
        ["conv1", "conv2d", "4", "8", 2, 200, 2000],
        ["q+k", "matmul", "–", "8/16", 1, 0, 5],
    ]
    assert [row[0] for row in run["layers"]] == ["down.0.conv1", "down.1.conv1", "qk"]
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    folded = re.search("<details><summary>every layer</summary>(.*?)</details>", page, re.DOTALL)
    assert folded.group(1).count("<tr>") == 4 and page.count("down.0.conv1") == 1


def test_seconds_of_interrupted_stages_add_up_and_passes_stand_below(tmp_path):
    assert read_run(make_run(tmp_path / "run"))["seconds"] == [
        ["calibrate", "10.0"],
        ["quantize", "12.0"],
        ["of which pass fit_ranges", "1.5"],
        ["of which pass reconstruct weight", "6.0"],
        ["of which pass reconstruct input", "6.0"],
    ]


def test_phases_of_passes_have_another_name_in_folders_of_earlier_versions(tmp_path):
    run = make_run(tmp_path / "run")
    found = read_run(run)
    lines = (run / "passes.jsonl").read_text()
    (run / "passes.jsonl").write_text(lines.replace('"phase"', '"stage"'))
    assert '"stage"' in (run / "passes.jsonl").read_text()
    again = read_run(run)
    assert again["seconds"] == found["seconds"]
    assert draw_block_errors(again["passes"]) == draw_block_errors(found["passes"]) != ""


def test_a_curve_leaves_out_what_is_no_number(tmp_path):
    assert read_run(make_run(tmp_path / "run"))["curve"] == [(0, 20.0), (1, 30.0)]
