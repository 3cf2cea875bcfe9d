"""The list of passes: words, order, facts, and ranges from the full-precision network."""

import pytest
import torch
from tiny import make_job, rules

from quant.network import input_quantizers, quant_layers
from quant.passes import run as passes
from quant.passes.fit_ranges import fit_ranges
from quant.passes.run import changed_passes, check_passes, run_passes
from quant.timeline import Timeline


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


def test_passes_run_in_order_and_facts_add_up(tiny_net, tmp_path, monkeypatch):
    def talk(job, *, word="a"):
        job.note([{"half": word}])
        return [{"word": word}]

    monkeypatch.setitem(passes.PASSES, "talk", talk)
    notes, job = [], make_job(tiny_net, tmp_path, rules(8, 32))
    job.note = lambda facts: notes.append(list(facts))
    fit_ranges(job)
    facts = run_passes(job, ["talk", {"talk": {"word": "b"}}])
    assert facts == [{"word": "a"}, {"word": "b"}]
    assert notes == [
        [{"half": "a"}],
        [{"word": "a"}],
        [{"word": "a"}, {"half": "b"}],
        [{"word": "a"}, {"word": "b"}],
    ]
    assert all(
        layer.weight_int is not None and layer.weight is None
        for layer in quant_layers(job.net).values()
    )


def test_a_pass_listed_twice_runs_twice(tiny_net, tmp_path):
    """What the first has finished is not what the second resumes from."""
    job = make_job(tiny_net, tmp_path, rules(4, 8))
    weights, inputs = (
        {"reconstruct": {"weight_iters": w, "input_iters": i, "batch_size": 4}}
        for w, i in ((2, 0), (0, 2))
    )
    facts = run_passes(job, ["fit_ranges", weights, inputs])[1:]
    units = [name for name in job.graph.units if quant_layers(job.net.get_submodule(name))]
    assert [(f["unit"], f["stage"]) for f in facts if f["stage"] == "weight"] == [
        (name, "weight") for name in units
    ]
    half = len(facts) // 2
    assert {f["stage"] for f in facts[half:]} <= {"input"} | {f["stage"] for f in facts[:half]}
    assert facts[half:] != facts[:half] and job.resume_folder == tmp_path


QUICK = {"reconstruct": {"weight_iters": 1, "input_iters": 0, "batch_size": 2}}


@pytest.mark.parametrize(
    "order, sentence",
    [
        (["reconstruct"], "reconstruct needs scales to begin with; list it after fit_ranges"),
        ([{"group_scales": {"groups": 2}}], "group_scales needs scales"),
        (["dynamic_scales"], "dynamic_scales needs scales"),
        (["reconstruct_temporal"], "reconstruct_temporal needs scales"),
        (["finetune"], "finetune needs scales"),
        (["softmax_grid"], "no one has fitted all scales; list fit_ranges"),
        (
            ["fit_ranges", "balance"],
            "balance changes what scales are fitted to; list it before fit_ranges",
        ),
        (
            ["fit_ranges", {"segment_models": {"passes": []}}],
            "begins every segment with the network as it was",
        ),
        (
            ["fit_ranges", {"group_scales": {"axis": "channel"}}],
            "has one scale for all of them; .* per: channel",
        ),
    ],
)
def test_what_cannot_be_composed_is_refused_in_words(order, sentence, tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(4, 8), num=12, boundaries=[300, 700])
    with pytest.raises(ValueError, match=sentence):
        run_passes(job, order)


@pytest.mark.parametrize(
    "before, name, sentence",
    [
        (
            ["fit_ranges"],
            "balance",
            "balance changes what scales are fitted to; list it before fit_ranges",
        ),
        (["fit_ranges"], "softmax_grid", "begins with the network as it was"),
        (
            ["fit_ranges", QUICK],
            "reconstruct_temporal",
            "weights are integers already when reconstruct_temporal begins",
        ),
        (
            ["fit_ranges", QUICK],
            "fit_ranges",
            "weights are integers already when fit_ranges begins",
        ),
        (
            ["fit_ranges", {"group_scales": {"groups": 2}}],
            "dynamic_scales",
            "scales are already given by an earlier pass",
        ),
    ],
)
def test_a_pass_that_others_call_finds_out_by_itself_what_it_comes_too_late_for(
    before, name, sentence, tiny_net, tmp_path
):
    """Passes from elsewhere may have done anything before."""
    job = make_job(tiny_net, tmp_path, rules(4, 8), num=12, boundaries=[300, 700])
    for entry in before:
        for one, options in check_passes([entry]):
            passes.PASSES[one](job, **options)
    with pytest.raises(ValueError, match=sentence):
        passes.PASSES[name](job)


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


def test_ranges_that_cannot_be_fitted_leave_the_switches_on(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(4, 8), num=2, boundaries=[300, 700])
    with pytest.raises(ValueError, match="hold no sample in time segment 1 of 3"):
        fit_ranges(job)
    assert all(q.enabled for q in input_quantizers(job.net).values()) and not job.net.observers
    assert all(layer.weight_quantizer.enabled for layer in quant_layers(job.net).values())


@pytest.mark.parametrize("batch_size", [3, 10, 64])
def test_ranges_are_those_of_the_full_precision_network(tiny_net, tmp_path, batch_size):
    """With samples to spare for all values, min-max does not depend on batches or on other
    quantizers."""
    job, seen = make_job(tiny_net, tmp_path, rules(2, 8)), {}
    fit_ranges(job, batch_size=batch_size)
    for name, module in tiny_net.named_modules():
        if name in quant_layers(job.net):
            module.register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0]))
    with torch.no_grad():
        tiny_net(job.calibration.x, job.calibration.t)
    for name, layer in quant_layers(job.net).items():
        parts = seen[name].split(layer.parts, dim=1) if len(layer.parts) > 1 else [seen[name]]
        expected = [
            (float(p.max().clamp(min=0)) - float(p.min().clamp(max=0))) / 255 for p in parts
        ]
        assert layer.input_quantizer.scale[0].tolist() == pytest.approx(expected, rel=1e-4), name
    assert all(q.enabled for q in input_quantizers(job.net).values()) and not job.net.observers


def test_only_so_many_samples_are_used(tiny_net, tmp_path):
    jobs = [make_job(tiny_net, tmp_path, rules(8, 8)) for _ in range(2)]
    jobs[1].calibration = jobs[1].calibration.subset(4, Timeline(), jobs[1].seed)
    fit_ranges(jobs[0], num_samples=4)
    fit_ranges(jobs[1])
    for a, b in zip(*(input_quantizers(job.net).values() for job in jobs)):
        assert torch.equal(a.scale, b.scale)


def test_facts_of_fitting(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(8, 8))
    assert fit_ranges(job) == [
        {
            "pass": "fit_ranges",
            "weights": len(quant_layers(job.net)),
            "inputs": len(input_quantizers(job.net)),
        }
    ]


@pytest.mark.parametrize("max_batch", [3, 256])
def test_no_pass_takes_more_samples_at_once_than_memory_allows(tiny_net, tmp_path, max_batch):
    sizes, job = (
        set(),
        make_job(tiny_net, tmp_path, rules(4, 8), num=12, boundaries=[500], max_batch=max_batch),
    )
    for module in (tiny_net, tiny_net.conv_in):
        module.register_forward_pre_hook(lambda _, arguments: sizes.add(len(arguments[0])))
    run_passes(
        job,
        [
            "decide_by_ranges",
            "softmax_grid",
            {"allocate_bits": {"num_samples": 8}},
            "balance",
            "fit_ranges",
            {
                "reconstruct": {
                    "weight_iters": 1,
                    "input_iters": 1,
                    "batch_size": 2,
                    "saliency": 0.5,
                    "gptq": True,
                }
            },
            "bypass_input",
        ],
    )
    assert max(sizes) == min(max_batch, 12)


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
