"""What tells two recipes apart, and the folders that runs share."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from pipeline import MODELS

from base.config import flatten, load
from base.files import PROJECT
from tinydm.identity import (
    CALIBRATION,
    DECIDES,
    IMAGES,
    NETWORK,
    NOTHING,
    TRAJECTORIES,
    decides,
    differences,
    folder_name,
    identity,
    images_of,
    recipe_of,
    select,
)
from tinydm.recipe import RunConfig
from tinydm.run_folder import open_run, provenance
from tinydm.stages import sample


def test_every_key_of_a_recipe_is_in_the_table_and_no_other():
    everything = asdict(RunConfig())
    assert {key.split(".")[0] for key in DECIDES} == everything.keys()
    for key in [*flatten(everything), *everything]:
        assert decides(key) in (IMAGES, TRAJECTORIES, CALIBRATION, NETWORK, NOTHING)
    assert DECIDES.keys() <= flatten(everything).keys() | everything.keys()
    with pytest.raises(KeyError):
        decides("sampler")


def test_a_key_stands_for_all_below_it_that_are_not_listed_themselves():
    assert decides("sampling.num") == NOTHING and decides("sampling.steps") == IMAGES
    assert decides("network.num") == IMAGES and decides("effort.batch_size") == NETWORK
    assert decides("calibration.seed") == TRAJECTORIES
    assert decides("calibration.options.seed") == CALIBRATION


def test_a_selection_keeps_what_decides_and_no_empty_branch():
    tree = {
        "sampling": {"num": 3, "steps": 5},
        "calibration": {"seed": 1},
        "network": {},
        "out": "x",
    }
    assert select(tree, (IMAGES,)) == {"sampling": {"steps": 5}, "network": {}}
    assert select(tree, (TRAJECTORIES, NOTHING)) == {
        "sampling": {"num": 3},
        "calibration": {"seed": 1},
        "out": "x",
    }
    table = {"lr": NETWORK, "sample_every": NOTHING}
    assert select({"lr": 0.1, "sample_every": 2}, (NETWORK,), table) == {"lr": 0.1}


def test_differences_leave_out_what_decides_nothing():
    a, b = RunConfig(name="m"), RunConfig(name="m")
    b.device, b.memory_gb, b.sampling.num = "cuda", 1.0, 7
    b.evaluation.extractor, b.demo = "inception", "bash demo.sh"
    assert differences(a, b) == []
    b.bits.weight = 4
    assert differences(a, b) == ["bits.weight (8 there, 4 here)"]


@pytest.mark.parametrize("option", ["num", "out", "device", "force", "variant", "evaluation"])
def test_an_option_of_a_foreign_pass_counts_whatever_its_name(option):
    a, b = (
        RunConfig(
            passes=["fit_ranges", {"mine.clip": {option: value}}],
            pass_options={"mine.clip": {option: value}},
            network={"family": "mine", option: value},
        )
        for value in (1, 2)
    )
    assert [text.split(" ")[0] for text in differences(a, b)] == [
        f"network.{option}",
        f"pass_options.mine.clip.{option}",
        "passes",
    ]
    assert identity(a) != identity(b)


def test_a_stored_recipe_says_how_to_draw_with_the_network():
    config = RunConfig(
        name="m",
        network=MODELS["class"]["network"],
        first_stage=MODELS["class"]["first_stage"],
        cond_stage=MODELS["class"]["cond_stage"],
        scale_factor=0.5,
        checkpoint="m.safetensors",
        exceptions=[{"match": "a", "weight": {"bits": 8}}],
        passes=["fit_ranges"],
        pass_options={"fit_ranges": {"num_samples": 7}},
        out="runs/m",
    )
    rules = [{"weight": {"bits": 4}}]
    recipe, everything = recipe_of(config, "ab12", rules), asdict(config)
    assert recipe["rules"] == rules and recipe["weights_hash"] == "ab12"
    assert recipe["passes"] == [{"fit_ranges": {"num_samples": 7}}]
    for key in ("first_stage", "cond_stage", "scale_factor", "checkpoint", "weights", "guidance"):
        assert recipe[key] == everything[key]
    del everything["sampling"]["num"]
    assert recipe["sampling"] == everything["sampling"]
    assert not recipe.keys() & {"out", "device", "exceptions", "pass_options", "provenance"}


def test_shared_folders_have_the_names_that_they_had():
    """As version ba71786 named them."""
    words = ["sampling.steps=20", "out=runs/x"]
    config = load(RunConfig, [PROJECT / "configs/model/cifar10.yaml"], words)
    model = SimpleNamespace(weights_hash="ab12", device=torch.device("cpu"))
    assert folder_name("float", images_of(config, model, 0)) == "float-1c6225ab"
    content = images_of(config, model, 1000) | {"start": "normal", "visited": [0, 5, 9]}
    assert folder_name("trajectory", content) == "trajectory-06c5b23e"


def test_full_precision_images_go_by_all_that_decides_them(pixel_run, tmp_path):
    run, prompts = open_run(pixel_run), tmp_path / "prompts.txt"
    names = [sample.sample_folder(run, "float").name]
    run.config.sampling.num = 99
    assert sample.sample_folder(run, "float").name == names[0]
    for change in (
        lambda c: c.network.update(norm_groups=2),
        lambda c: setattr(c, "scale_factor", 0.5),
        lambda c: (setattr(c.sampling, "prompts", str(prompts)), prompts.write_text("a cat")),
        lambda c: prompts.write_text("a dog"),
        lambda c: setattr(c.sampling, "seed", 7),
    ):
        change(run.config)
        names.append(sample.sample_folder(run, "float").name)
    assert len(set(names)) == 6


def test_provenance_names_files_from_the_project_on_and_none_that_was_not_given(tmp_path):
    model = SimpleNamespace(weights_hash="ab", device=torch.device("cpu"))
    found = provenance(model, [PROJECT / "configs/a.yaml", "", tmp_path / "b.yaml"])["files"]
    assert found == ["configs/a.yaml", str(tmp_path / "b.yaml")]
