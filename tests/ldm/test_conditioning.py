"""Class embedder and CLIP text encoder: recorded numbers, published names, prompts to tokens."""

import hashlib
import json
import sys

import pytest
import torch
from conftest import assert_close, below, read_fixture

from ldm.conditioning import ClassEmbedder
from models.zoo import build_network

TINY = {
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
}
PUBLIC = {
    "class-embedder": (
        1,
        "aea6766e2d51059b328b7648db2e95b28e62ada1a57c1cbbad21a4c2d2b70de8",
        {"n_classes": 1001, "embed_dim": 512},
    ),
    "clip-text": (
        196,
        "93179ce0b78a9d8f23fb5fc278c15d8227a02339e44efc1d6fd436e8d8a776b9",
        {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    ),
}


@pytest.fixture
def clip():
    """Skips where the optional package is absent; -> the builder of text encoders."""
    pytest.importorskip("transformers", reason="the text encoder needs: pip install -e .[text]")
    return lambda **options: build_network("clip-text", **options).eval()


@pytest.fixture
def vocabulary(tmp_path):
    """A folder with a vocabulary of nine tokens in CLIP's format; the last two are begin and
    end."""
    words = ["a", "b", "c", "a</w>", "b</w>", "c</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(
        json.dumps({word: number for number, word in enumerate(words)})
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return tmp_path


def test_class_embedder_gives_a_context_of_length_one():
    net = ClassEmbedder(n_classes=4, embed_dim=5)
    context = net(torch.tensor([3, 0]))
    assert context.shape == (2, 1, 5) and torch.equal(context[0, 0], net.embedding.weight[3])


@torch.no_grad()
def test_text_encoder_gives_the_recorded_values(clip):
    meta, weights, tensors = read_fixture("clip_text")
    net = clip(**meta["config"]["text"])
    net.transformer.load_state_dict(below("text/", weights))
    assert_close(net(tensors["in/ids"]), tensors["out/last_hidden_state"], meta["tolerance"])


@pytest.mark.parametrize("family", PUBLIC)
def test_public_weights_fit_strictly(family, request):
    if family == "clip-text":
        request.getfixturevalue("clip")
    num_keys, digest, options = PUBLIC[family]
    with torch.device("meta"):
        net = build_network(family, **options)
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in net.state_dict().items())
    assert (
        len(lines) == num_keys and hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest
    )


@torch.no_grad()
def test_text_encoder_from_the_meta_device_computes_the_same(clip):
    net, ids = clip(**TINY), torch.tensor([[7, 1, 2, 8, 8, 8]])
    with torch.device("meta"):
        copy = clip(**TINY)
    copy.to_empty(device="cpu").load_state_dict(net.state_dict())
    assert torch.equal(copy(ids), net(ids))


def test_position_numbers_in_a_file_are_left_out(clip):
    net = clip(**TINY)
    positions = {"transformer.text_model.embeddings.position_ids": torch.arange(6)[None]}
    net.load_state_dict({**net.state_dict(), **positions})
    with pytest.raises(RuntimeError, match="position_idx"):
        net.load_state_dict(
            {**net.state_dict(), "transformer.text_model.embeddings.position_idx": torch.zeros(1)}
        )


@torch.no_grad()
def test_a_token_sees_only_what_came_before(clip):
    net, ids = clip(**TINY), torch.tensor([[7, 1, 2, 3, 8, 8], [7, 1, 2, 0, 5, 8]])
    hidden = net(ids)
    assert hidden.shape == (2, 6, 8)
    assert_close(hidden[0, :3], hidden[1, :3], 1e-6)
    assert (hidden[0, 3:] - hidden[1, 3:]).abs().max() > 1e-3


def test_prompts_become_tokens_of_one_length(clip, vocabulary):
    net = clip(**TINY, tokenizer=str(vocabulary))
    ids = net.tokenize(["AB  c", "", "a b c a b c"])
    assert ids.tolist() == [[7, 6, 5, 8, 8, 8], [7, 8, 8, 8, 8, 8], [7, 3, 4, 5, 3, 8]]
    assert ids.dtype == torch.int64


def test_absent_vocabulary(clip, vocabulary):
    (vocabulary / "merges.txt").unlink()
    with pytest.raises(ValueError) as error:
        clip(**TINY, tokenizer=str(vocabulary)).tokenize(["a"])
    assert str(error.value) == (
        "prompts need CLIP's tokenizer: put vocab.json and merges.txt of "
        f"openai/clip-vit-large-patch14 into {vocabulary}"
    )


def test_absent_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError) as error:
        build_network("clip-text", **TINY)
    assert str(error.value) == (
        "the text encoder needs the package transformers, which is not installed; "
        f"run: {sys.executable} -m pip install -e .[text]"
    )
