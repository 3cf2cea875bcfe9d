"""Training: closed forms of its parts, and a killed run that continues to the weights of an
uninterrupted one."""

import math
import signal

import pytest
import torch
from trainings import STEPS, images, killed_training, make

from tinydm.training.diffusion import DiffusionTraining, multiscale
from tinydm.training.loop import ImageBatches, fit


@pytest.fixture
def quiet(monkeypatch):
    """Sample grids want a larger image than the tiny network draws usefully; the loss curve is
    enough."""
    monkeypatch.setattr(DiffusionTraining, "draw_samples", lambda self, path: None)


@pytest.mark.parametrize("killed_at", [STEPS - 1, STEPS + 2, 2 * STEPS])
def test_killed_and_resumed_run_ends_in_the_same_weights(tmp_path, quiet, killed_at):
    straight = make()
    rows = fit(straight, *images(), tmp_path / "straight")
    with killed_training(killed_at):
        fit(make(), *images(), tmp_path / "resumed")
    resumed = make()
    assert fit(resumed, *images(), tmp_path / "resumed") == rows
    assert [n for n, _ in rows] == [16, 32, 44]
    for network in ("net", "ema"):
        expected = getattr(straight, network).state_dict()
        for name, value in getattr(resumed, network).state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_finished_run_stays_as_it_is(tmp_path, quiet):
    rows = fit(make(), *images(), tmp_path)
    again = make()
    assert fit(again, *images(), tmp_path) == rows
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_interrupt_reaches_the_script(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffusionTraining, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(make(), *images(), tmp_path)
    finally:
        # Lightning turns Ctrl-C off while it shuts down
        signal.signal(signal.SIGINT, handler)


def test_average_of_weights_equals_a_loop():
    module = make()
    value, decay = module.net.unet.conv_in.bias, module.config.ema_decay
    mean = value.detach().clone()
    for n in range(20):
        value.data += torch.randn(8)
        module.on_train_batch_end()
        if n == 0:  # the first average is the first value
            mean = value.detach().clone()
            continue
        d = min(decay, (1 + n) / (10 + n))
        mean = d * mean + (1 - d) * value.detach()
    assert torch.allclose(module.ema.module.unet.conv_in.bias, mean, atol=1e-5)


def test_learning_rate_is_a_warm_up_then_a_cosine():
    module = make(num_images=100 * 4, warmup_steps=10)
    plan = module.configure_optimizers()
    optimizer, schedule = plan["optimizer"], plan["lr_scheduler"]["scheduler"]
    for step in range(101):
        expected = 1e-2 * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / 100)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


def test_epoch_draws_every_image_once_before_any_twice():
    source, labels = images(10)

    def order(seed, epoch):
        batches = ImageBatches(source, labels, batch_size=4, num_batches=5, seed=seed, epoch=epoch)
        assert len(batches) == 5 and torch.equal(batches[1][0], source[batches[1][1]])
        return torch.cat([batches[i][1] for i in range(5)]).tolist()

    drawn = order(0, 0)
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn == order(0, 0) != order(0, 1) != order(1, 0)


def test_training_lowers_the_loss(tmp_path, quiet):
    rows = fit(make(num_images=30 * 4, steps_per_epoch=10), *images(4), tmp_path)
    assert rows[-1][1] < rows[0][1]


def test_sample_grid_is_drawn(tmp_path):
    make().draw_samples(tmp_path / "grid.png", num=4)
    assert (tmp_path / "grid.png").stat().st_size > 0


def test_multiscale_error_counts_a_constant_at_every_scale_and_a_chequerboard_at_one():
    constant = torch.full((2, 3, 8, 8), 0.5)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert float(multiscale(constant)) == pytest.approx((1 + 2 + 4 + 8) * 0.25)
    assert float(multiscale(board.expand(2, 3, 8, 8))) == pytest.approx(1.0)
