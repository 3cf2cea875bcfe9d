"""Plans of comparisons: the runs that follow from them, and mistakes that are said before any
work."""

from pathlib import Path

import pytest
from comparison import plan_file

from base.config import load
from base.files import PROJECT
from tinydm import compare
from tinydm.plan import CompareConfig, cells_of, is_finished, yaml_path
from tinydm.report.results import read_results


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["variants=[quad]"], "variants must be a mapping .*; found \\['quad'\\]"),
        (["variants={a/b: []}"], "variant 'a/b' cannot be part of a folder's name"),
        (
            ["variants={quad: sampling.skip=quad}"],
            "variant 'quad' must be a list .*; found sampling.skip=quad",
        ),
        (["variants={quad: [quad]}"], "no method or preset is called 'quad'"),
        (["variants={quad: [sampling.skp=quad]}"], "did you mean 'skip'"),
        (["variants={a: [], b: []}"], "are the same recipe; leave one out"),
        (["methods=[minmaxx]"], "minmaxx.yaml does not exist; did you mean minmax.yaml"),
        (["methods=[tinydm,TWIN]"], "tinydm and .*twin.yaml are both called 'tinydm'"),
        (["models=[]"], "nothing to compare: models is empty"),
        (["seeds=[1,0]"], "sampling.seed and the calibration.seed are both 0"),
        (["overrides=[sampling.stps=4]"], "did you mean 'steps'"),
        (["modles=[]"], "did you mean 'models'"),
        (["--jobs", "1", "seeds=[1,0]"], "sampling.seed and the calibration.seed are both 0"),
        (["--jobs", "0"], "jobs is 0; it must be at least 1"),
        (["launcher=slrum"], "launcher 'slrum' is unknown; did you mean 'slurm'"),
        (["slurm=gpu"], "key 'slurm': Cannot assign str to Dict"),
    ],
)
def test_mistakes_get_one_sentence_before_any_work(models, tmp_path, words, sentence):
    twin = tmp_path / "twin.yaml"
    twin.write_text(f"base: {PROJECT}/configs/method/tinydm.yaml\nsegments: 2")
    with pytest.raises(ValueError, match=sentence):
        compare.run(
            [
                plan_file(models, tmp_path / "wrong"),
                *(word.replace("TWIN", str(twin)) for word in words),
            ]
        )
    assert not (tmp_path / "wrong").exists()


def test_a_variants_method_stands_in_the_place_of_the_rows(models, tmp_path):
    """Nothing of tinydm, which sets more keys, stays behind."""
    words = ["methods=[tinydm]", "variants={q: [qdiffusion], own: []}", "seeds=[1]"]
    plan = load(CompareConfig, [plan_file(models, tmp_path / "v")], words)
    q, own = (cell.config for cell in cells_of(plan))
    assert (q.method, q.segments, q.calibration.builder) == ("qdiffusion", 1, "uniform")
    assert (own.method, own.segments, own.calibration.builder) == ("tinydm", "per_step", "linspace")


def test_a_variants_preset_goes_on_top_of_the_comparisons(models, tmp_path):
    """By name, or by a path; the row's method stays."""
    (tmp_path / "few.yaml").write_text("preset: few\neffort: {weight_iters: 7}")
    words = [f"variants={{own: [], few: [{tmp_path}/few.yaml], whole: [paper]}}", "seeds=[1]"]
    plan = load(CompareConfig, [plan_file(models, tmp_path / "p")], words)
    plan.overrides = [word for word in plan.overrides if not word.startswith("effort")]
    own, few, whole = (cell.config for cell in cells_of(plan))
    assert [one.method for one in (own, few, whole)] == ["minmax"] * 3
    assert [one.preset for one in (own, few, whole)] == ["demo", "few", "paper"]
    assert [one.effort.weight_iters for one in (own, few, whole)] == [200, 7, 20000]
    assert few.effort.batch_size == own.effort.batch_size == 16


def test_two_comparisons_in_one_folder_are_refused(models, tmp_path):
    file = plan_file(models, tmp_path / "one")
    with pytest.raises(ValueError, match="same out folder"):
        compare.run([file, file])


@pytest.mark.parametrize(
    "path", sorted((PROJECT / "configs/compare").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_comparison_that_ships_says_what_can_be_run(path):
    plan = load(CompareConfig, [path], ["seeds=[1000]"])
    assert all(Path(yaml_path("bits", bits)).exists() for bits in plan.bits)
    # the rest is alike, and a second's work for ten runs
    plan.bits = plan.bits[-1:]
    cells = cells_of(plan)
    rows = len(plan.models) * len(plan.bits) * len(plan.methods) * len(plan.variants or [0])
    assert len({cell.folder for cell in cells}) == len(cells) == rows
    for cell in cells:
        for rule in cell.config.exceptions:
            assert rule.get("weight", {}).get("bits", 8) in (4, 8, cell.config.bits.weight)


def test_the_results_that_ship_are_of_todays_recipes():
    """A comparison that is told of them makes none of them again."""
    known = str(PROJECT / "results/equal.jsonl")
    plan = load(CompareConfig, [PROJECT / "configs/compare/equal.yaml"], [f"known={known}"])
    plan.models, plan.bits, plan.seeds = ["latent-compact"], ["w4a4"], [1000]
    names = {result.name for result in read_results(known)}
    cells = [cell for cell in cells_of(plan) if cell.name in names]
    assert len(cells) == len(plan.methods) and all(map(is_finished, cells))
