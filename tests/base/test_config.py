"""Configurations: files merge left to right, then key=value; every mistake ends in one sentence."""

from dataclasses import dataclass, field

import pytest

from base.config import flatten, load, read_yaml, take_words


@dataclass
class Bits:
    weight: int = 8
    input: int = 8


@dataclass
class Schema:
    name: str = ""
    bits: Bits = field(default_factory=Bits)
    symmetric: bool = False
    rules: list = field(default_factory=list)
    facts: dict = field(default_factory=dict)


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to


def test_later_files_and_overrides_win(write):
    first = write("a.yaml", "name: a\nbits: {weight: 4, input: 6}\nrules: [{match: '*', bits: 3}]")
    second = write("b.yaml", "name: b\nbits: {weight: 2}")
    config = load(Schema, [first, second], ["bits.input=5", "symmetric=true"])
    assert config == Schema("b", Bits(2, 5), True, [{"match": "*", "bits": 3}])
    assert isinstance(config.bits, Bits)


MISTAKES = {
    "unknown key 'bits.wieght'; did you mean 'weight'?": ("bits: {wieght: 4}", ()),
    "unknown key 'nam'; did you mean 'name'?": ("nam: x", ()),
    "unknown key 'zzz'; known: name, bits, symmetric, rules, facts": ("zzz: x", ()),
    "'bits.inputt=4': unknown key 'bits.inputt'; did you mean 'input'?": (
        "name: x",
        ("bits.inputt=4",),
    ),
    "key 'bits.weight': Value 'four'": ("bits: {weight: four}", ()),
    "key 'symmetric': Value 'perhaps'": ("name: x", ("symmetric=perhaps",)),
    "'force' is not key=value": ("name: x", ("force",)),
    "is not valid YAML": ("name: [1, 2", ()),
    "must hold keys and values": ("- 1\n- 2", ()),
    "'name={a:[b}' has a malformed value": ("name: x", ("name={a:[b}",)),
    "'facts=[1]': a list or mapping stands where": ("name: x", ("facts=[1]",)),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes(write, sentence):
    text, overrides = MISTAKES[sentence]
    with pytest.raises(ValueError) as error:
        load(Schema, [write("run.yaml", text)], overrides)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_the_file_with_the_mistake_is_named(write):
    with pytest.raises(ValueError, match="b.yaml: unknown key"):
        load(Schema, [write("a.yaml", "name: a"), write("b.yaml", "nme: b")])


def test_absent_file_suggests_its_neighbours(write):
    path = write("w4a8.yaml", "name: x")
    with pytest.raises(ValueError, match=r"w4a88.yaml does not exist; did you mean w4a8.yaml\?"):
        read_yaml(path.with_name("w4a88.yaml"))
    with pytest.raises(ValueError, match="does not exist$"):
        read_yaml(path.with_name("nothing-alike"))


@pytest.mark.parametrize("text", ["name: ${nmae}", "name: ${bits.wieght}"])
def test_reference_to_nothing(write, text):
    with pytest.raises(ValueError) as error:
        load(Schema, [write("run.yaml", text)])
    assert "run.yaml" in str(error.value) and "\n" not in str(error.value)


def test_override_without_a_key(write):
    with pytest.raises(ValueError, match="=3"):
        load(Schema, [write("run.yaml", "name: x")], ["=3"])


def test_empty_file_changes_nothing(write):
    assert load(Schema, [write("empty.yaml", "")]) == Schema()


def test_a_file_goes_on_top_of_its_base(write):
    write(
        "a.yaml",
        "name: a\nbits: {weight: 4, input: 6}\nrules: [one, '${bits.weight}']\nfacts: {k: 1}",
    )
    write(
        "b.yaml",
        "base: a.yaml\nbits: {input: 5}\nfirst: {rules: [zero]}\nlast: {rules: [{end: "
        "'${bits.input}'}]}",
    )
    top = write("c.yaml", "base: b.yaml\nname: c\nlast: {rules: [last]}")
    assert load(Schema, [top], ["bits.weight=7"]).rules[2] == 7
    assert load(Schema, [top]) == Schema(
        "c", Bits(4, 5), False, ["zero", "one", 4, {"end": 5}, "last"], {"k": 1}
    )


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("base: absent.yaml", "absent.yaml does not exist"),
        ("base: c.yaml", "c.yaml is its own base"),
        ("base: a.yaml\nfirst: {name: [b]}", "name is none"),
        ("base: a.yaml\nlast: {rules: {b: 1}}", "rules is none"),
        ("base: a.yaml\nlast: [b]", "first and last add lists to lists"),
        ("first: {rules: [b]}", "unknown key 'first'"),
    ],
)
def test_mistakes_about_a_base(write, text, sentence):
    write("a.yaml", "name: a\nrules: [one]")
    with pytest.raises(ValueError, match=sentence):
        load(Schema, [write("c.yaml", text)])


def test_flat_keys():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}, "f": None}) == {
        "a.b": 1,
        "a.c.d": [2],
        "f": None,
    }


def test_words_of_a_stage_are_taken_from_those_of_a_recipe():
    words = ["shard=0/2", "seed=1", "shard=1/2", "out=a=b"]
    taken, others = take_words(words, {"shard": "0/1", "precision": "simulated"})
    assert taken == {"shard": "1/2", "precision": "simulated"}
    assert others == ["seed=1", "out=a=b"]
