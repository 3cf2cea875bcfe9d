"""What workers compute of a batch adds up to what one computes alone."""

import pytest
import torch
from tiny import make_job, rules

from base import workers
from quant.passes.run import run_passes
from quant.reconstruction import learn


@pytest.mark.parametrize(
    "options",
    [
        {"joint": True, "layer_weight": 0.8, "saliency": 0.5},  # random draws, inner layers
        {"round_weight": 0.5, "smooth": 0.01},  # two phases, penalties
    ],
)
@pytest.mark.parametrize("count", [2, 7])  # of a batch of 5
def test_shares_of_a_batch_add_up_to_its_gradient(tiny_net, tmp_path, monkeypatch, options, count):
    compared = []

    def compare(lesson, groups, iters, norm, penalty):
        parameters = [p for group in groups for p in group["params"]]
        before, after = lesson.generator.get_state(), []

        def gradients(number, count):
            lesson.generator.set_state(before)
            with monkeypatch.context() as patch:
                patch.setattr(workers, "number", lambda: number)
                patch.setattr(workers, "count", lambda: count)
                loss = learn.batch_loss(lesson, norm) + penalty(0.5) / count
            after.append(lesson.generator.get_state())
            return torch.autograd.grad(loss, parameters)

        whole = gradients(0, 1)
        shares = [gradients(number, count) for number in range(count)]
        for exact, *parts in zip(whole, *shares):
            torch.testing.assert_close(sum(parts), exact, rtol=1e-4, atol=1e-5 * exact.abs().max())
        assert all(torch.equal(state, after[0]) for state in after)
        compared.append(lesson.unit.name)

    monkeypatch.setattr(learn, "optimise", compare)
    job = make_job(tiny_net, tmp_path, rules(4, 4), num=12, boundaries=[500])
    run_passes(job, ["fit_ranges", {"reconstruct": {"batch_size": 5, **options}}])
    assert set(compared) == set(job.graph.units)
