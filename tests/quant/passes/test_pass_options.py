"""Words and values of a list of passes: what is refused at once, and what is changed on top."""

import pytest
from tiny import make_job, rules

from quant.passes.run import changed_passes, check_passes, run_passes


@pytest.mark.parametrize(
    "entry, complaint",
    [
        ("fit_range", "pass 'fit_range' is unknown; did you mean 'fit_ranges'?"),
        (
            {"reconstruct": {"weight_iter": 3}},
            "'reconstruct' has no option 'weight_iter'; did you mean 'weight_iters'?",
        ),
        ({"fit_ranges": {"job": 3}}, "pass 'fit_ranges' has no option 'job'"),
    ],
)
def test_unknown_words_are_explained_before_anything_runs(entry, complaint, tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(8, 8), note=pytest.fail)
    with pytest.raises(ValueError, match=complaint.replace("?", r"\?")):
        run_passes(job, ["fit_ranges", entry])


def test_words_with_and_without_options():
    assert check_passes(
        ["fit_ranges", {"fit_ranges": None}, {"fit_ranges": {"num_samples": 4}}]
    ) == [("fit_ranges", {}), ("fit_ranges", {}), ("fit_ranges", {"num_samples": 4})]


@pytest.mark.parametrize(
    "entry, sentence",
    [
        (
            {"correct_noise": {"bias": "residul"}},
            "bias 'residul' of correct_noise is unknown; choose residual, total",
        ),
        ({"correct_noise": {"bias": True}}, "bias 'True' of correct_noise is unknown"),
        (
            {"correct_noise": {"slope": "sign"}},
            "slope 'sign' of correct_noise is unknown; choose true, signed or false",
        ),
        (
            {"correct_noise": {"per": "tensor"}},
            "per 'tensor' of correct_noise is unknown; choose channel or line",
        ),
        (
            {"group_scales": {"axis": "row"}},
            "axis 'row' of group_scales is unknown; choose timestep or channel",
        ),
        (
            {"allocate_bits": {"budget": "bop"}},
            "budget 'bop' of allocate_bits is unknown; choose size or bops",
        ),
        ({"allocate_bits": {"choices": 4}}, "choices of allocate_bits is 4; it must be a list"),
        (
            {"reconstruct": {"weight_iters": "abc"}},
            "weight_iters of reconstruct is abc; it must be a whole number",
        ),
        ({"reconstruct": {"weight_iters": -3}}, "weight_iters of reconstruct is -3"),
        ({"reconstruct": {"weight_iters": True}}, "weight_iters of reconstruct is True"),
        ({"reconstruct": {"joint": 1}}, "joint of reconstruct is 1; it must be true or false"),
        ({"reconstruct": {"drop": "half"}}, "drop of reconstruct is half; it must be a number"),
        ({"reconstruct": {"drop": 5}}, "drop of reconstruct is 5; it must lie between 0 and 1"),
        ({"reconstruct": {"saliency": -0.1}}, "saliency of reconstruct is -0.1; it must lie"),
        (
            {"segment_models": {"passes": [{"reconstruct": {"joint": "yes"}}]}},
            "joint of reconstruct is yes",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_before_anything_runs(entry, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_passes([entry])


def test_values_that_fit_are_taken_as_they_are():
    options = {"num_samples": None, "batch_size": 3}
    assert check_passes(
        [
            {"fit_ranges": options},
            {"reconstruct": {"weight_lr": 1, "joint": True}},
            {"correct_noise": {"slope": "signed", "bias": False}},
        ]
    )[0] == ("fit_ranges", options)


LIST = [
    "softmax_grid",
    {"segment_models": {"passes": [{"fit_ranges": {"num_samples": 5}}, "reconstruct"]}},
    "finetune",
]


def test_options_on_top_of_a_list_of_passes():
    changes = {
        "fit_ranges": {"batch_size": 2},
        "softmax_grid": None,
        "reconstruct": None,
        "finetune": {"iters": 3},
    }
    inner = {"fit_ranges": {"num_samples": 5, "batch_size": 2}}
    assert changed_passes(LIST, changes) == [
        {"segment_models": {"passes": [inner]}},
        {"finetune": {"iters": 3}},
    ]
    assert check_passes(changed_passes(LIST, {})) == [
        ("softmax_grid", {}),
        ("segment_models", {"passes": [{"fit_ranges": {"num_samples": 5}}, {"reconstruct": {}}]}),
        ("finetune", {}),
    ]
    assert LIST[2] == "finetune" and LIST[0] == "softmax_grid"  # the list itself stays


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"finetunes": None},
            "names the pass 'finetunes', which this method does not have; did you mean 'finetune'",
        ),
        ({"fit_range": {}}, "did you mean 'fit_ranges'"),
        (
            {"softmax_grid": 3},
            "pass_options.softmax_grid is 3; it must be a mapping such as .*, or null",
        ),
    ],
)
def test_options_of_passes_that_are_not_there(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        changed_passes(LIST, changes)
