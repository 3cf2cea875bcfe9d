"""Generated reference pages: methods from planted YAMLs, keys, passes and builders from planted
code."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from base.config import Share
from base.files import PROJECT
from quant.spec import QuantSpec
from tinydm.keys import describe_keys
from tinydm.plan import CompareConfig
from tinydm.recipe import RunConfig
from tinydm.report import reference
from tinydm.report.reference import keys_block, methods_block
from tinydm.training.config import TrainConfig

HEAD = """# NewQ (Someone et al., CONF 2030, arXiv:2301.00001; code): rounds
# well. Not copied: its mistakes.
"""
METHOD = """method: newq
segments: per_step
calibration: {builder: normal, options: {mean: 0.3}}
rules:
  - {match: "*", weight: {bits: "${bits.weight}", per: channel}, input: {bits: "${bits.input}"},
     balance: true}
  - {kind: matmul, role: probs, input: {bits: '${bits.softmax}'}}
  - {role: [stem, out], weight: {bits: 32}, input: {bits: 8}}
passes:
  - fit_ranges: {num_samples: null}
  - segment_models: {passes: [{reconstruct: {drop: 0.5, joint: true}}]}
"""
SECTION = """## newq

NewQ (Someone et al., CONF 2030, arXiv:2301.00001; code): rounds
well. Not copied: its mistakes.

*Time and data:* `segments: per_step`, calibration by `normal` with `{mean: 0.3}`.

| rule for | weights | inputs |
| --- | --- | --- |
| all layers and products; `balance` | `bits.weight`, `per: channel` | `bits.input` |
| attention products, probs |  | `bits.softmax` |
| stem, out | `float` | `8` |

| pass | of the method | from the preset |
| --- | --- | --- |
| `fit_ranges` | `num_samples: null` | `num_values` |
| `segment_models` | – | – |
| in `segment_models`: `reconstruct` | `drop: 0.5`, `joint: true` | PRESET |"""


def test_a_method_has_a_section_and_its_released_form_one_below(tmp_path, monkeypatch):
    (tmp_path / "configs/method").mkdir(parents=True)
    (tmp_path / "configs/compare").mkdir()
    for name, text in {
        "method/newq": HEAD + METHOD,
        "method/newq_as_released": "# As its code.\nbase: newq.yaml\nmethod: newq_as_released\n",
        "method/first": "# Plain.\nmethod: first\nrules: []\npasses: [fit_ranges]\n",
        "compare/equal": "methods: [first]",
    }.items():
        (tmp_path / f"configs/{name}.yaml").write_text(text)
    monkeypatch.setattr(reference, "PROJECT", tmp_path)
    page = "\n".join(methods_block())
    paper = "Someone et al., CONF 2030, [arXiv:2301.00001](https://arxiv.org/abs/2301.00001)"
    assert page.splitlines()[2:5] == [
        "| [`first`](#first) | – | `fit_ranges` |",
        f"| [`newq`](#newq) | {paper} | `fit_ranges`, `segment_models` |",
        f"| [`newq_as_released`](#newq_as_released) | {paper} | `fit_ranges`, `segment_models` |",
    ]
    # joint learning has one count alone
    preset = "`weight_iters`, `weight_lr`, `input_lr`, `batch_size`, `dtype`, "
    preset += "`num_samples`, `gptq`"
    assert SECTION.replace("PRESET", preset) in page
    assert "\n### newq_as_released\n\nAs its code.\n" in page


@dataclass
class Inner:
    many: list[int] = field(default_factory=list)  # in turn


@dataclass
class Outer:
    # a | b: which
    # of them
    word: str = "a"
    inner: Inner = field(default_factory=Inner)


def test_keys_have_type_default_and_comment():
    assert keys_block(f"{__name__}.Outer") == [
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
        r"| `word` | `str` | `a` | a \| b: which of them |",
        "| `inner.many` | `list[int]` | `[]` | in turn |",
    ]


def wave(job, *, kind: Literal["up", True] = "up", share: Share = 0.5, steps=(1, 2), rest=None):
    """The pass: waves at `job`.

    Facts: none. Raises ValueError never."""


def still(job):
    """Does nothing. Returns nothing."""


def test_functions_have_their_docstring_and_options():
    lines = reference._options_block({"wave": wave, "still": still})
    assert lines == [
        "### `wave`",
        "",
        "Waves at `job`.",
        "",
        "| option | default | choices |",
        "| --- | --- | --- |",
        "| `kind` | `up` | up true |",
        "| `share` | `0.5` |  |",
        "| `steps` | `[1, 2]` |  |",
        "| `rest` | `null` |  |",
        "",
        "### `still`",
        "",
        "Does nothing.",
        "",
        "No options.",
    ]


@pytest.mark.parametrize("schema", [RunConfig, TrainConfig, CompareConfig, QuantSpec])
def test_every_key_is_on_the_page_and_says_what_it_is(schema):
    page = (PROJECT / "docs/configuration.md").read_text()
    for key, _, _, comment in describe_keys(schema):
        assert f"| `{key}` |" in page and comment, key


@pytest.mark.parametrize("name", sorted(p.stem for p in (PROJECT / "configs/method").glob("*")))
def test_every_method_that_ships_has_a_head(name):
    assert len(" ".join(reference._head(name))) > 40
