"""A pass declares itself: one file in the folder of passes is found by its name, checked, ordered,
timed and given what the preset says."""

import inspect
from dataclasses import dataclass

import pytest
from tiny import facts_of, make_job, rules

from quant.passes.declare import Moment, with_fields
from quant.passes.find import declaration_of, find_pass, pass_names
from quant.passes.order import check_needs, check_order
from quant.passes.run import check_passes, run_passes, with_effort

TOY = """
from quant.passes.declare import Moment, quant_pass


def check(plan):
    if plan.options.get("share", 1.0) == 0:
        raise ValueError("nothing would be left of the weights")


@quant_pass(
    moment=Moment.BALANCE,
    once=True,
    excludes={"balance": "both change the weights"},
    inside_segments="it is a toy; leave it out",
    needs_segments="3",
    one_network=True,
    effort={"rounds": "weight_iters", "share": "weight_lr"},
    idle=lambda options, names: {"share"} if options.get("plain") else set(),
    check=check,
)
def toy(job, *, rounds=1, share=1.0, plain=False):
    return [{"pass": "toy", "rounds": rounds}]
"""
PASSES = [
    "allocate_bits",
    "balance",
    "bypass_input",
    "correct_noise",
    "decide_by_ranges",
    "dynamic_scales",
    "finetune",
    "fit_ranges",
    "group_scales",
    "reconstruct",
    "reconstruct_temporal",
    "segment_models",
    "softmax_grid",
    "step_bits",
]


def test_every_file_that_holds_a_function_of_its_name_is_a_pass():
    assert pass_names() == PASSES
    assert all(find_pass(name).__name__ == name for name in PASSES)
    assert all(declaration_of(name).moment for name in PASSES)


def test_a_pass_is_one_file(tiny_net, tmp_path, write_pass):
    write_pass("toy", TOY)
    assert "toy" in pass_names()
    job = make_job(tiny_net, tmp_path, rules(8, 8), boundaries=[300, 700])
    facts = run_passes(job, [{"toy": {"rounds": 3}}, "fit_ranges"])
    assert facts_of("toy", facts) == [{"pass": "toy", "rounds": 3}]
    assert [fact["pass"] for fact in facts if "seconds" in fact] == ["toy", "fit_ranges"]


@pytest.mark.parametrize(
    "entries, sentence",
    [
        (["toys"], "pass 'toys' is unknown; did you mean 'toy'?"),
        ([{"toy": {"round": 1}}], "pass 'toy' has no option 'round'; did you mean 'rounds'?"),
        ([{"toy": {"rounds": 0.5}}], "rounds of toy is 0.5; it must be a whole number, 0 or more"),
        (["fit_ranges", "toy"], "toy changes what scales are fitted to; list it before fit_ranges"),
        (["toy", "toy"], "toy is listed twice; list it once"),
        (["toy", "balance"], "toy and balance do not go together: both change the weights"),
        (
            [{"segment_models": {"passes": ["toy", "fit_ranges"]}}],
            "toy cannot be inside segment_models: it is a toy; leave it out",
        ),
    ],
)
def test_what_it_says_is_checked(write_pass, entries, sentence):
    write_pass("toy", TOY)
    with pytest.raises(ValueError) as error:
        check_passes(entries)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "options, num_segments, rules, sentence",
    [
        ({}, 1, [], "toy needs several time segments; set segments: 3"),
        ({"share": 0}, 3, [], "nothing would be left of the weights"),
        ({}, 3, [{"weight": {"per_segment": True}}], "toy works on one network for all steps"),
    ],
)
def test_what_it_needs_is_checked(write_pass, options, num_segments, rules, sentence):
    write_pass("toy", TOY)
    listed = [("toy", options), ("segment_models", {"passes": ["fit_ranges"]})]
    with pytest.raises(ValueError, match=sentence):
        check_needs(listed, rules, num_segments)


def test_a_pass_that_says_nothing_stands_anywhere_but_behind_measurements(write_pass):
    write_pass("plain", "def plain(job):\n    return []\n")
    check_order([(name, {}) for name in ("plain", "fit_ranges", "plain", "finetune", "plain")])
    with pytest.raises(ValueError, match="correct_noise measured the finished network"):
        check_order([("correct_noise", {}), ("plain", {})])


EFFORT = {
    "weight_iters": 7,
    "input_iters": 5,
    "weight_lr": 0.3,
    "input_lr": 0.2,
    "batch_size": 4,
    "dtype": "fp32",
}


def test_effort_fills_what_the_list_does_not_say(write_pass):
    write_pass("toy", TOY)
    entries = ["fit_ranges", "toy", {"toy": {"rounds": 1}}, {"toy": {"plain": True}}, "else.where"]
    assert with_effort(entries, EFFORT) == [
        "fit_ranges",
        {"toy": {"rounds": 7, "share": 0.3}},
        {"toy": {"rounds": 1, "share": 0.3}},
        {"toy": {"plain": True, "rounds": 7}},
        "else.where",
    ]
    assert entries[1] == "toy"


@pytest.mark.parametrize(
    "options, before, left_out",
    [
        ({}, "fit_ranges", set()),
        ({"joint": True}, "fit_ranges", {"input_iters"}),
        ({"weight_iters": 0}, "fit_ranges", {"weight_lr"}),
        ({"input_iters": 0}, "fit_ranges", {"input_lr"}),
        ({}, "dynamic_scales", {"input_lr"}),
        ({}, "group_scales", {"input_lr"}),
    ],
)
def test_effort_leaves_out_what_reconstruction_would_not_use(options, before, left_out):
    inner = [before, {"reconstruct": options}]
    (_, filled), (outer,) = (
        with_effort(inner, EFFORT),
        with_effort([{"segment_models": {"passes": inner}}], EFFORT),
    )
    wanted = {key: value for key, value in EFFORT.items() if key not in left_out} | options
    assert filled == {"reconstruct": wanted}
    assert outer["segment_models"]["passes"][1] == filled


@dataclass(frozen=True)
class Pair:
    left: int = 1
    right: float = 0.5


@dataclass(frozen=True)
class Word:
    word: str = "a"


def test_fields_of_dataclasses_are_options():
    @with_fields
    def told(job, *, own: int = 3, pair: Pair, word: Word):
        """Says what it was given."""
        return own, pair, word

    parameters = inspect.signature(told).parameters
    assert list(parameters) == ["job", "own", "left", "right", "word"]
    assert parameters["left"].default == 1 and parameters["right"].annotation is float
    assert told(None) == (3, Pair(), Word())
    assert told(None, right=2.0, word="b", own=4) == (4, Pair(1, 2.0), Word("b"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'up'"):
        told(None, up=1)


def test_moments_are_in_the_order_of_their_names():
    assert [moment.place for moment in Moment] == list(range(len(Moment)))
