"""The list of passes: words, order, facts, and ranges from the full-precision network."""

import logging

import pytest
from tiny import facts_of, make_job, rules

from quant.network import quant_layers
from quant.passes.find import find_pass
from quant.passes.fit_ranges import fit_ranges
from quant.passes.job import Job
from quant.passes.run import check_passes, run_passes

TALK = """
from quant.passes.declare import quant_pass


@quant_pass()
def talk(job, *, word="a"):
    job.note([{"half": word}])
    return [{"word": word}]
"""


def without_seconds(facts):
    return [{key: value for key, value in fact.items() if key != "seconds"} for fact in facts]


def test_passes_run_in_order_and_facts_add_up(tiny_net, tmp_path, write_pass):
    write_pass("talk", TALK)
    notes, job = [], make_job(tiny_net, tmp_path, rules(8, 32))
    job.note = lambda facts: notes.append(without_seconds(facts))
    fit_ranges(job)
    facts = run_passes(job, ["talk", {"talk": {"word": "b"}}])
    closing = {"pass": "talk"}
    assert without_seconds(facts) == [{"word": "a"}, closing, {"word": "b"}, closing]
    assert notes == [
        [{"half": "a"}],
        [{"word": "a"}, closing],
        [{"word": "a"}, closing, {"half": "b"}],
        [{"word": "a"}, closing, {"word": "b"}, closing],
    ]
    assert all(
        layer.weight_int is not None and layer.weight is None
        for layer in quant_layers(job.net).values()
    )


SLEEP = """
import time


def sleep(job, *, seconds=0.05):
    time.sleep(seconds)
    return []
"""


def test_every_pass_reports_the_seconds_that_it_took(tiny_net, tmp_path, write_pass):
    write_pass("sleep", SLEEP)
    job = make_job(tiny_net, tmp_path, rules(8, 32))
    facts = run_passes(job, ["fit_ranges", "sleep", {"sleep": {"seconds": 0.2}}])
    closing = [fact for fact in facts if fact.keys() == {"pass", "seconds"}]
    assert [fact["pass"] for fact in closing] == ["fit_ranges", "sleep", "sleep"]
    assert facts[-1] is closing[-1] and closing[0]["seconds"] > 0
    assert 0.05 <= closing[1]["seconds"] < 0.2 <= closing[2]["seconds"] < 2


FAIL = """
def fail(job):
    raise RuntimeError("no")
"""


@pytest.mark.parametrize("passes", [["fit_ranges"], ["fit_ranges", "fail"], ["fail"]])
def test_the_job_is_left_as_it_was(tiny_net, tmp_path, write_pass, passes):
    """Also by a pass that fails on the way."""
    write_pass("fail", FAIL)
    notes = []
    job = make_job(tiny_net, tmp_path, rules(8, 32), note=notes.append)
    before = job.note
    if "fail" in passes:
        with pytest.raises(RuntimeError, match="no"):
            run_passes(job, passes)
    else:
        run_passes(job, passes)
    assert job.note is before and job.resume_folder == tmp_path


def test_a_job_logs_and_prints_nothing(tmp_path, capsys, caplog, monkeypatch):
    # what an earlier test of a command may have installed
    monkeypatch.setattr(logging.getLogger("tinydm"), "handlers", [])
    job = Job(None, None, None, None, tmp_path)
    with caplog.at_level("INFO", "tinydm"):
        job.log("a line")
    assert caplog.messages == ["a line"] and capsys.readouterr().out == ""


def test_a_pass_listed_twice_runs_twice(tiny_net, tmp_path):
    """What the first has finished is not what the second resumes from."""
    job = make_job(tiny_net, tmp_path, rules(4, 8))
    weights, inputs = (
        {"reconstruct": {"weight_iters": w, "input_iters": i, "batch_size": 4}}
        for w, i in ((2, 0), (0, 2))
    )
    facts = facts_of("reconstruct", run_passes(job, ["fit_ranges", weights, inputs]))
    units = [name for name in job.graph.units if quant_layers(job.net.get_submodule(name))]
    assert [f["unit"] for f in facts if f["phase"] == "weight"] == units
    half = len(facts) // 2
    assert {f["phase"] for f in facts[half:]} <= {"input"} | {f["phase"] for f in facts[:half]}
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
            find_pass(one)(job, **options)
    with pytest.raises(ValueError, match=sentence):
        find_pass(name)(job)


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
