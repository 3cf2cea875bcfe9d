"""Recipes of earlier versions are read as today's."""

from dataclasses import asdict

import pytest
from omegaconf import OmegaConf

from base.config import load
from tinydm.earlier import renewed
from tinydm.identity import differences
from tinydm.recipe import RunConfig
from tinydm.report.results import config_of

LEARNING = {"reconstruct": {"weight_iters": 3, "bfloat16": False, "memory_gb": 4.0}}
BEFORE = {
    "effort": {"weight_iters": 3, "bfloat16": True},
    "passes": ["fit_ranges", LEARNING, {"segment_models": {"passes": [LEARNING]}}],
    "pass_options": {"finetune": {"bfloat16": True}, "toy.mine": {"bfloat16": True}},
    "memory_gb": 2.0,
}
LEARNING_TODAY = {"reconstruct": {"weight_iters": 3, "dtype": "fp32"}}
TODAY = {
    "effort": {"weight_iters": 3, "dtype": "bf16"},
    "passes": ["fit_ranges", LEARNING_TODAY, {"segment_models": {"passes": [LEARNING_TODAY]}}],
    # options of a pass from elsewhere are its own
    "pass_options": {"finetune": {"dtype": "bf16"}, "toy.mine": {"bfloat16": True}},
    "memory_gb": 2.0,
}


def test_words_of_before_become_todays_and_those_of_today_stay():
    assert renewed(BEFORE) == TODAY == renewed(TODAY)
    assert renewed({"effort": {"bfloat16": "auto"}}) == {"effort": {"dtype": "auto"}}


def test_a_folder_and_a_results_file_of_before_are_the_recipe_of_today(tmp_path):
    configs = [config_of(BEFORE), config_of(TODAY)]
    for name, content in (("before", BEFORE), ("today", TODAY)):
        OmegaConf.save(OmegaConf.create(content), tmp_path / f"{name}.yaml")
        configs.append(load(RunConfig, [tmp_path / f"{name}.yaml"]))
    assert all(asdict(config) == asdict(configs[0]) for config in configs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_auto_is_whatever_was_decided(dtype):
    asked = RunConfig(passes=["reconstruct"])
    asked.effort.dtype = "auto"
    asked = RunConfig(passes=["reconstruct"], effort=asked.effort)
    assert "dtype" not in asked.passes[0]["reconstruct"]
    decided = asked.with_dtype(dtype)
    assert decided.passes[0]["reconstruct"]["dtype"] == decided.effort.dtype == dtype
    assert not differences(asked, decided) and not differences(decided, asked)
    other = {"fp32": "bf16", "bf16": "fp32"}[dtype]
    assert decided.with_dtype(other) is decided
    assert any("dtype" in said for said in differences(decided, asked.with_dtype(other)))
