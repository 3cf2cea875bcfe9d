"""How a quantized model computes by a word: what is chosen, what is refused, and what is said."""

import pytest
import torch
from tiny import quantized, rules

from quant.integer import select
from quant.integer.lower import IntegerNet
from tinydm import precision
from tinydm.precision import _apart, check_precision, with_precision

NO_ENGINE = "this is another processor"


@pytest.fixture
def small(tiny_model, tmp_path):
    """A model of 4-bit weights and 8-bit inputs."""
    return tiny_model.with_net(quantized(tiny_model.net, tmp_path, rules(4, 8)))


def test_words():
    for word in ("auto", "integer", "simulated", "float"):
        check_precision(word)
    with pytest.raises(ValueError, match="precision 'integers' is unknown.*integer"):
        check_precision("integers")


def test_unknown_word_is_refused_for_a_model(small):
    with pytest.raises(ValueError, match="precision 'int8' is unknown"):
        with_precision(small, "int8", 4)


def test_each_word_draws_the_same_images(small):
    models = [with_precision(small, word, 3)[0] for word in ("simulated", "integer", "auto")]
    images = [model.sample(range(3)) for model in models]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert not isinstance(models[0].net, IntegerNet) and isinstance(models[1].net, IntegerNet)


@pytest.mark.parametrize(
    "equal, factor, chosen, said",
    [
        (True, 1.25, True, "integers (51 of 51 quantized layers on int8, 1.25 x as fast as"),
        (True, 0.8, False, "simulated integers (51 of 51 quantized layers on int8, 0.80 x as fast"),
        (False, 9.0, False, "simulated integers (a trial gave other bits)"),
    ],
)
def test_auto_is_integer_where_that_is_exact_and_faster(
    small, monkeypatch, equal, factor, chosen, said
):
    monkeypatch.setattr(precision, "trial", lambda *_: (equal, factor))
    model, about = with_precision(small, "auto", 4)
    assert isinstance(model.net, IntegerNet) == chosen and about.startswith(said)
    assert with_precision(small, "simulated", 4)[1] == "simulated integers"
    model, about = with_precision(small, "integer", 4)  # whatever the trial
    assert isinstance(model.net, IntegerNet)
    assert ("not the same bits" in about) != equal and about.startswith("integers (51 of 51")


@pytest.mark.parametrize("batch_size, count", [(3, 3), (64, 8)])
def test_a_trial_is_of_the_batches_to_come_and_short(small, monkeypatch, batch_size, count):
    seen = []

    def trial(simulated, integer, arguments):
        seen.extend(arguments)
        return True, 2.0

    monkeypatch.setattr(precision, "trial", trial)
    with_precision(small, "auto", batch_size)
    x, t = seen
    assert x.shape == (count, *small.shape)
    assert (t == max(small.sampling.sequence(small.schedule))).all()


def test_integer_is_refused_in_one_sentence_where_auto_says_why(small, monkeypatch):
    monkeypatch.setattr(select, "cpu_engine", lambda: NO_ENGINE)
    refusal = f"precision=integer is not possible here: no integer engine here: {NO_ENGINE}; use"
    with pytest.raises(ValueError, match=refusal):
        with_precision(small, "integer", 4)
    model, about = with_precision(small, "auto", 4)
    assert not isinstance(model.net, IntegerNet)
    assert about == f"simulated integers (no integer engine here: {NO_ENGINE})"


def test_a_network_without_quantized_inputs_has_no_integer_form(tiny_model, tmp_path):
    net = quantized(tiny_model.net, tmp_path, rules(4, 32))
    with pytest.raises(ValueError, match="precision=integer is not possible here: no layer"):
        with_precision(tiny_model.with_net(net), "integer", 4)
    model, about = with_precision(tiny_model.with_net(net), "auto", 4)
    assert "its input is not quantized" in about and not isinstance(model.net, IntegerNet)


def test_a_model_on_integers_stays_as_it_is(tiny_model, tmp_path):
    net = quantized(tiny_model.net, tmp_path, rules(4, 8))
    model, _ = with_precision(tiny_model.with_net(net), "integer", 4)
    again, about = with_precision(model, "auto", 4)
    assert again is model and about == "integers, as it was given"


def test_answers_are_apart_in_units_of_the_first():
    given = (torch.tensor([3.0, 4.0]),)
    assert _apart(lambda x: x, lambda x: x + torch.tensor([0.0, 1.0]), given) == pytest.approx(0.2)
