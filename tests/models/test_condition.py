"""Conditions belong to images: classes and prompts by (seed, index), whatever the batch."""

import json

import pytest
import torch
from torch import nn

from ldm.conditioning import ClassEmbedder
from models.condition import build_condition, by_class, by_prompt, read_prompts


def test_wanted_classes_come_in_turn():
    condition = by_class(10, torch.tensor, wanted=[3, 7])
    assert condition.rows(0, [0, 1, 2, 5]).tolist() == [3, 7, 3, 7]


def test_drawn_classes_depend_on_seed_and_index_and_leave_the_null_class_out():
    condition = by_class(4, torch.tensor, null=2)
    drawn = condition.rows(1, range(3000)).tolist()
    assert (
        drawn[7:9] == condition.rows(1, [7, 8]).tolist()
        and drawn != condition.rows(2, range(3000)).tolist()
    )
    counts = [drawn.count(c) for c in range(4)]
    assert counts[2] == 0 and sum(counts) == 3000 and min(counts[0], counts[1], counts[3]) > 850
    assert condition.null_row().tolist() == [2]


def test_a_class_that_does_not_exist():
    with pytest.raises(
        ValueError, match=r"class 4 in sampling.classes does not exist; this model has 0 to 3"
    ):
        by_class(4, torch.tensor, wanted=[1, 4])


def test_prompts_in_turn():
    assert by_prompt(["a", "b", "c"], list).rows(0, [2, 3]) == ["c", "a"]
    # calibration: from the end
    assert by_prompt(["a", "b", "c"], list).rows(1000, [0, 1, 3]) == ["c", "b", "c"]
    assert by_prompt(["a", "b", "c"], list, sampling_seed=1000).rows(1000, [0, 1, 3]) == [
        "a",
        "b",
        "a",
    ]


def test_prompts_of_a_text_file_and_of_coco_captions(tmp_path):
    (tmp_path / "p.txt").write_text("a red bus\n\n  a cat \n")
    assert read_prompts(tmp_path / "p.txt") == ["a red bus", "a cat"]
    notes = [
        {"image_id": 9, "caption": "nine"},
        {"image_id": 2, "caption": "two "},
        {"image_id": 9, "caption": "no"},
    ]
    (tmp_path / "c.json").write_text(json.dumps({"annotations": notes}))
    assert read_prompts(tmp_path / "c.json") == ["two", "nine"]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("none.txt", None, "does not exist"),
        ("empty.txt", "\n \n", "holds no prompts"),
        ("broken.json", "{", "is no COCO captions file"),
        ("other.json", "[]", "is no COCO captions file"),
    ],
)
def test_useless_files_of_prompts(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(tmp_path / name)


def test_networks_say_what_they_are_conditioned_on():
    net = nn.Linear(1, 1)
    assert build_condition(net, None, {}, {}) is None
    net.num_classes = 5
    assert build_condition(net, None, {"classes": [4]}, {}).rows(0, [0]).tolist() == [4]
    embedder = ClassEmbedder(n_classes=6, embed_dim=3)
    condition = build_condition(net, embedder, {"classes": [1, 2]}, {"null_class": 5})
    assert torch.equal(condition.rows(0, [0, 1]), embedder.embedding.weight[[1, 2]][:, None])
    assert torch.equal(condition.null_row(), embedder.embedding.weight[5][None, None])
    embedder.tokenize = None
    with pytest.raises(ValueError, match="give a file with sampling.prompts=PATH"):
        build_condition(net, embedder, {}, {})
