"""Which passes go together, and in which order: what cannot work is refused before any work
begins."""

STAGES = [  # from first to last, and why one of them cannot wait
    (
        ("decide_by_ranges", "allocate_bits", "step_bits", "softmax_grid"),
        "decides about the network as it was",
    ),
    (("balance",), "changes what scales are fitted to"),
    (("segment_models",), "begins every segment with the network as it was"),
    (("fit_ranges",), "fits scales to weights that nothing has rounded yet"),
    (
        ("dynamic_scales", "group_scales"),
        "gives functions in place of scales, which later passes learn",
    ),
    (("reconstruct_temporal",), "learns layers that the blocks are learned upon"),
    (("reconstruct",), "learns what later passes go on from"),
    (("bypass_input", "finetune"), "changes the network that later passes measure"),
    (("correct_noise",), ""),
]
STAGE = {name: i for i, (names, _) in enumerate(STAGES) for name in names}
# what they found holds for the network that they saw
MEASURED = "bypass_input", "correct_noise"
ONCE = "segment_models", "allocate_bits", "step_bits", "bypass_input"
NOT_BOTH = [
    ("dynamic_scales", "group_scales", "both give the scales"),
    ("balance", "segment_models", "segments begin with the network as it was, without balance"),
]
WHOLE = "it decides for the whole network; list it before segment_models"
OUTSIDE = {
    "softmax_grid": WHOLE,
    "allocate_bits": WHOLE,
    "step_bits": WHOLE,
    "decide_by_ranges": WHOLE,
    "balance": "it changes what scales are fitted to, also of norms, which the segments share; "
    "leave it out",
    "dynamic_scales": "each of the segments has one scale alone; leave it out",
    "group_scales": "each of the segments has one scale alone; leave it out",
    "segment_models": "each of the segments is one alone; leave it out",
    "finetune": "it changes norms and biases, which the segments share; leave it out",
    "bypass_input": "it fits the finished network; list it after segment_models",
    "correct_noise": "it measures the finished network; list it after segment_models",
}
SEVERAL = {
    "segment_models": "3 or more",
    "decide_by_ranges": "per_step",
    "dynamic_scales": "per_step",
    "group_scales": "per_step",
}  # need segments of time -> what is usual


def check_order(passes):
    """Raises ValueError for a list of (name, options) that cannot work, whatever the network: a
    pass that would undo what an earlier one did, or come too late for it. Passes from elsewhere,
    `module.function`, may stand anywhere but behind those that measure the finished network."""
    names = [name for name, _ in passes]
    for i, name in enumerate(names):
        for earlier in names[:i]:
            if name == earlier and name in ONCE:
                raise ValueError(f"{name} is listed twice; list it once")
            if STAGE.get(name, len(STAGES)) < STAGE.get(earlier, 0):
                raise ValueError(f"{name} {STAGES[STAGE[name]][1]}; list it before {earlier}")
            if name not in STAGE and earlier in MEASURED:
                raise ValueError(
                    f"{earlier} measured the finished network, which {name} would change; list it "
                    "before "
                    f"{earlier}"
                )
    for one, other, why in NOT_BOTH:
        if one in names and other in names:
            raise ValueError(f"{one} and {other} do not go together: {why}; leave one out")
    for inner in inner_names(passes):
        if inner in OUTSIDE:
            raise ValueError(f"{inner} cannot be inside segment_models: {OUTSIDE[inner]}")


def inner_names(passes):
    """Names of the passes inside segment_models."""
    return [
        next(iter(entry)) if isinstance(entry, dict) else entry
        for _, options in passes
        for entry in options.get("passes", [])
    ]


def check_needs(passes, rules, num_segments):
    """Raises ValueError where the rules or the number of time segments are not those that a list of
    (name, options) needs."""
    names, inner = [name for name, _ in passes], inner_names(passes)
    if "fit_ranges" not in [*names, *inner] and not any("." in name for name in [*names, *inner]):
        raise ValueError("no pass fits the scales; list fit_ranges")
    for name in names:
        if name in SEVERAL and num_segments == 1:
            raise ValueError(f"{name} needs several time segments; set segments: {SEVERAL[name]}")
    if "step_bits" in names and num_segments > 1:
        raise ValueError("step_bits makes its own time segments; leave `segments` at 1")
    if "balance" in names and not any(rule.get("balance") for rule in rules):
        raise ValueError(
            "no layer is to be balanced; say balance: true in a rule, or leave out the pass balance"
        )
    options = dict(passes).get("reconstruct", {})
    if options.get("active") and "group_scales" not in names:
        raise ValueError(
            "the active choice of batches goes by how undecided group_scales is, which this "
            "method lacks; "
            "list it before reconstruct, or leave out active"
        )
    if any(rule.get("weight", {}).get("per_segment") for rule in rules):
        check_own_weights(names)


def check_own_weights(names):
    """Of rules with per_segment."""
    if "segment_models" not in names and not any("." in name for name in names):
        raise ValueError(
            "own weights for every time segment (per_segment) are made by the pass "
            "segment_models, inside "
            "which fit_ranges and reconstruct belong; list it, or leave out per_segment"
        )
    for name in ("allocate_bits", "reconstruct", "finetune"):
        if name in names:
            raise ValueError(
                f"{name} works on one network for all steps, this one has own weights for every "
                "time "
                f"segment (per_segment); leave out {name}, or per_segment"
            )
