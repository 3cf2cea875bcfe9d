"""Which lists of passes are refused, before any network is there."""

import pytest

from quant.passes.order import check_needs, check_order


def listed(*entries):
    return [(entry, {}) if isinstance(entry, str) else entry for entry in entries]


@pytest.mark.parametrize(
    "names, sentence",
    [
        (
            ["fit_ranges", "softmax_grid"],
            "softmax_grid decides about the network as it was; list it before fit_ranges",
        ),
        (
            ["balance", "allocate_bits"],
            "allocate_bits decides about the network as it was; list it before balance",
        ),
        (
            ["fit_ranges", "balance"],
            "balance changes what scales are fitted to; list it before fit_ranges",
        ),
        (
            ["fit_ranges", "reconstruct", "fit_ranges"],
            "fit_ranges fits scales to weights that nothing has rounded",
        ),
        (
            ["fit_ranges", "reconstruct", "dynamic_scales"],
            "dynamic_scales gives .* list it before reconstruct",
        ),
        (
            ["fit_ranges", "reconstruct", "group_scales"],
            "group_scales gives .* list it before reconstruct",
        ),
        (
            ["fit_ranges", "reconstruct", "reconstruct_temporal"],
            "reconstruct_temporal .* list it before reconstruct",
        ),
        (
            ["fit_ranges", "segment_models"],
            "segment_models begins every segment .* list it before fit_ranges",
        ),
        (
            ["fit_ranges", "finetune", "reconstruct"],
            "reconstruct learns what later passes go on from; list it bef",
        ),
        (["fit_ranges", "bypass_input", "reconstruct"], "list it before bypass_input"),
        (
            ["fit_ranges", "correct_noise", "finetune"],
            "finetune changes the network that later passes measure; list",
        ),
        (
            ["fit_ranges", "correct_noise", "my.own"],
            "correct_noise measured the finished network, which my.own",
        ),
        (["fit_ranges", "bypass_input", "my.own"], "bypass_input measured the finished network"),
        (["segment_models", "segment_models"], "segment_models is listed twice"),
        (["allocate_bits", "allocate_bits", "fit_ranges"], "allocate_bits is listed twice"),
        (
            ["fit_ranges", "group_scales", "dynamic_scales"],
            "dynamic_scales and group_scales do not go together: both give",
        ),
        (["balance", "segment_models"], "balance and segment_models do not go together"),
    ],
)
def test_an_order_that_cannot_work_is_refused(names, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_order(listed(*names))


@pytest.mark.parametrize(
    "inner, sentence",
    [
        ("softmax_grid", "list it before segment_models"),
        ({"allocate_bits": {}}, "list it before segment_models"),
        ("step_bits", "list it before"),
        ("decide_by_ranges", "list it before"),
        ("balance", "leave it out"),
        ("finetune", "leave it out"),
        ("dynamic_scales", "has one scale alone"),
        ("group_scales", "has one scale alone"),
        ("segment_models", "is one alone"),
        ("bypass_input", "list it after"),
        ("correct_noise", "list it after"),
    ],
)
def test_what_segments_share_or_do_not_have_cannot_be_decided_in_one_of_them(inner, sentence):
    name = inner if isinstance(inner, str) else next(iter(inner))
    with pytest.raises(ValueError, match=f"{name} cannot be inside segment_models: .*{sentence}"):
        check_order(listed(("segment_models", {"passes": ["fit_ranges", inner]})))


@pytest.mark.parametrize(
    "names",
    [
        [
            "decide_by_ranges",
            "allocate_bits",
            "softmax_grid",
            "balance",
            "fit_ranges",
            "dynamic_scales",
            "reconstruct",
            "bypass_input",
            "finetune",
            "correct_noise",
        ],
        ["fit_ranges", "finetune", "bypass_input"],
        ["fit_ranges", "reconstruct", "reconstruct"],
        ["balance", "balance"],
        ["my.own", "fit_ranges", "my.own", "reconstruct", "my.own"],
        ["segment_models", "bypass_input", "correct_noise"],
    ],
)
def test_an_order_that_works_is_not(names):
    check_order(listed(*names))


EVERYTHING = [{"match": "*", "weight": {"bits": 4}, "input": {"bits": 8}}]
BALANCED, OWN = [{"balance": True}], [{"weight": {"per_segment": True}}]
SEGMENTS = "segment_models", {"passes": ["fit_ranges"]}


@pytest.mark.parametrize(
    "entries, rules, num_segments, sentence",
    [
        (["softmax_grid"], EVERYTHING, 1, "no pass fits the scales; list fit_ranges"),
        ([], EVERYTHING, 1, "no pass fits the scales"),
        (
            ["fit_ranges", "dynamic_scales"],
            EVERYTHING,
            1,
            "dynamic_scales needs several time segments; .* per_step",
        ),
        (["fit_ranges", "group_scales"], EVERYTHING, 1, "group_scales needs several time segments"),
        (
            [SEGMENTS],
            EVERYTHING,
            1,
            "segment_models needs several time segments; set segments: 3 or more",
        ),
        (
            ["step_bits", "fit_ranges"],
            EVERYTHING,
            3,
            "step_bits makes its own time segments; leave `segments` at 1",
        ),
        (
            ["balance", "fit_ranges"],
            EVERYTHING,
            1,
            "no layer is to be balanced; say balance: true in a rule",
        ),
        (
            ["fit_ranges", ("reconstruct", {"active": 1.5})],
            EVERYTHING,
            1,
            "by how undecided group_scales is",
        ),
        (["fit_ranges"], OWN, 3, r"\(per_segment\) are made by the pass segment_models"),
        ([SEGMENTS, "finetune"], OWN, 3, "finetune works on one network for all steps"),
        ([SEGMENTS, "reconstruct"], OWN, 3, "reconstruct works on one network"),
        (["allocate_bits", SEGMENTS], OWN, 3, "allocate_bits works on one network"),
    ],
)
def test_rules_and_segments_that_a_list_of_passes_cannot_work_with(
    entries, rules, num_segments, sentence
):
    with pytest.raises(ValueError, match=sentence):
        check_needs(listed(*entries), rules, num_segments)


@pytest.mark.parametrize(
    "entries, rules, num_segments",
    [
        (["balance", "fit_ranges"], BALANCED, 1),
        ([SEGMENTS, "bypass_input"], OWN, 3),
        ([SEGMENTS, "finetune"], EVERYTHING, 3),
        (["my.own"], EVERYTHING, 1),
        (["fit_ranges", "group_scales", ("reconstruct", {"active": 1.5})], EVERYTHING, 50),
    ],
)
def test_rules_and_segments_that_they_can(entries, rules, num_segments):
    check_needs(listed(*entries), rules, num_segments)
