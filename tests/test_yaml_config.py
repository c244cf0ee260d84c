"""YAML configurations: what is accepted comes back exact, what is not is named by file, line and
key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editr2.config.yaml import check_keys, dump_yaml, load_yaml, to_dataclass
from editr2.errors import ConfigError


@dataclass(frozen=True)
class Reward:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Train:
    siblings: int = 6
    lr: float = 1e-4
    clip: Optional[float] = None  # noqa: UP045  (the old spelling must work too)
    amp: bool = True
    mode: Literal["cm", "cu"] = "cm"
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Config:
    name: str = "run"
    train: Train = field(default_factory=Train)
    reference: Train | None = None
    rewards: tuple[Reward, ...] = ()
    notes: dict[str, float | str | None] = field(default_factory=dict)
    out: Path | None = None
    stage: int | str = 0


def read(tmp_path: Path, text: str | bytes) -> Config:
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    values, lines = load_yaml(path)
    check_keys(values, lines, Config, path)
    return to_dataclass(values, Config)


def problem(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "c.yaml")) and "\n" not in message
    return message.removeprefix(str(tmp_path / "c.yaml"))


def test_values_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "# head\nname: x\ntrain:\n  lr: 1e-4\nrewards:\n- name: IF\n- {name: CC, weight: 2}\n"
    )
    values, lines = load_yaml(path)
    assert values == {
        "name": "x",
        "train": {"lr": "1e-4"},
        "rewards": [{"name": "IF"}, {"name": "CC", "weight": 2}],
    }
    assert lines == {
        "name": 2,
        "train": 3,
        "train.lr": 4,
        "rewards": 5,
        "rewards[0]": 6,
        "rewards[0].name": 6,
        "rewards[1]": 7,
        "rewards[1].name": 7,
        "rewards[1].weight": 7,
    }
    config = read(tmp_path, path.read_text())
    assert config.train.lr == 1e-4 and config.rewards == (Reward("IF"), Reward("CC", 2.0))
    assert isinstance(config.rewards[1].weight, float)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n", "\ufeff"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == Config()


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+2", 100.0),
        ("-.5e1", -5.0),
        ("3", 3.0),
        ("1.5", 1.5),
        (".inf", float("inf")),
    ],
)
def test_floats(tmp_path: Path, written: str, value: float) -> None:
    lr = read(tmp_path, f"train: {{lr: {written}}}").train.lr
    assert lr == value and type(lr) is float


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  sibling: "
         "3\n", ":2: unknown key 'train.sibling' (did you mean 'train.siblings'?)"),
        ("xyzzy: "
         "3\n", ":1: unknown key 'xyzzy' (accepted: name, train, reference, rewards, notes, out, "
                "stage)"),
        ("rewards:\n- name: a\n- name: b\n  wieght: "
         "2\n", ":4: unknown key 'rewards[1].wieght' (did you mean"),
        ("reference:\n  lrr: "
         "3\n", ":2: unknown key 'reference.lrr' (did you mean 'reference.lr'?)"),
        ("rewards:\n- weight: 2\n", ":2: missing key 'rewards[0].name' (it has no default)"),
        ("train:\n  siblings: 2.5\n", ":2: train.siblings: 2.5 (accepted: a whole number)"),
        ("train:\n  siblings: true\n", ":2: train.siblings: true"),
        ("train:\n  siblings: 1e3\n", ":2: train.siblings: '1e3' (accepted: a whole number)"),
        ("train:\n  siblings: "
         "010\n", ":2:13: 010 is 8 in YAML (accepted: 8, or quoted if it is a text)"),
        ("train:\n  siblings: 1:30\n", ":2:13: 1:30 is 90 in YAML"),
        ("train:\n  lr: -1:30.5\n", ":2:7: -1:30.5 is -90.5 in YAML"),
        ("train:\n  amp: 1\n", ":2: train.amp: 1 (accepted: true or false)"),
        ("train:\n  lr: false\n", ":2: train.lr: false"),
        ("train:\n  lr: 1e999\n", ":2: train.lr: '1e999' (accepted: a number)"),
        ("train:\n  lr: nine\n", ":2: train.lr: 'nine' (accepted: a number)"),
        ("train:\n  lr:\n", ":2: train.lr: none (accepted: a number)"),
        ("train:\n  clip: [1]\n", ":2: train.clip: a list of 1 (accepted: a number or none)"),
        ("train:\n  mode: cx\n", ":2: train.mode: 'cx' (accepted: cm, cu)"),
        ("train:\n  betas: "
         "[1]\n", ":2: train.betas: a list of 1 (accepted: a list of 2, each a number)"),
        ("train:\n  betas:\n  - 0.9\n  - x\n", ":4: train.betas[1]: 'x' (accepted: a number)"),
        ("name: no\n", ":1: name: false (accepted: a text)"),
        ("name: 2020-01-01\n", ":1: name: datetime.date(2020, 1, 1), a date (accepted: a text)"),
        ("train: 3\n", ":1: train: 3 (accepted: keys and values)"),
        ("reference: 3\n", ":1: reference: 3 (accepted: keys and values or none)"),
        ("notes:\n  a: [1]\n", ":2: notes.a: a list of 1 (accepted: a number or a text or none)"),
        ("stage: [1]\n", ":1: stage: a list of 1 (accepted: a whole number or a text)"),
        ("name: a\ntrain:\n  lr: 1\n  siblings: 2\n  lr: "
         "2\n", ":5:3: key 'train.lr' was already given on line 3"),
        ("name: a\nname: b\n", ":2:1: key 'name' was already given on line 1"),
        ("3: a\n", ":1:1: key 3 is not a string"),
        ("yes: a\n", ":1:1: key yes is not a string"),
        ("? [a]\n: b\n", ":1:3: key a list is not a string"),
        ("base: &b {lr: 1}\ntrain:\n  <<: *b\n", ":3:3: merge keys (<<) are not accepted"),
        ("name: &a [*a]\n", ":1:7: an alias to what contains it"),
        ("name: !!python/object:os.system x\n", ":1:7: 'x' is not a valid python/object:os.system"),
        ("name: !!int x\n", ":1:7: 'x' is not a valid int"),
        ("name: 2020-13-45\n", ":1:7: '2020-13-45' is not a valid timestamp"),
        ("name: !!set {a}\n", ":1:7: tag set (accepted: no tag)"),
        ("- a\n", ":1:1: a list (accepted: keys and values)"),
        ("hello\n", ":1:1: a single value (accepted: keys and values)"),
        ("a: 1\n---\nb: 2\n", ":2:1: but found another document"),
        ("name: [a\ntrain: {}\n", ":2:6: expected ',' or ']', but got ':'"),
        ("name: a\n\ttrain: 3\n", ":2:1: found character '\\t' that cannot start any token"),
        ("name: a\x00\n", ":1: character "),
        (b"name: \xff\n", ": byte 7 is not UTF-8"),
        ("name: " + "[" * 1000, ": nested too deeply"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{y}: &{y} "
            f"[{','.join(['*' + x] * 10)}]\n" for x, y in zip("abcdef", "bcdefg", strict=True)
        ), ":1:26: more than 100000 values after aliases are expanded"),
    ],
)  # fmt: skip
def test_errors(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert problem(tmp_path, text).startswith(expected)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope.yaml: cannot be read: No such file"):
        load_yaml(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_yaml(tmp_path)


def test_in_a_union_the_exact_type_comes_first(tmp_path: Path) -> None:
    assert read(tmp_path, "notes: {a: '1e-4', b: 1.5, c: 2, d: }").notes == {
        "a": "1e-4",
        "b": 1.5,
        "c": 2.0,
        "d": None,
    }


def test_aliases_are_expanded(tmp_path: Path) -> None:
    config = read(tmp_path, "train: &t {siblings: 3}\nreference: *t\n")
    assert config.train == config.reference == Train(siblings=3)


def test_values_without_a_file() -> None:
    with pytest.raises(
        ConfigError, match=r"^cli: unknown key 'train.lrr' \(did you mean 'train.lr'\?\)$"
    ):
        check_keys({"train": {"lrr": 1}}, {}, Config, "cli")
    with pytest.raises(ConfigError, match=r"^train.siblings: 'a'"):
        to_dataclass({"train": {"siblings": "a"}}, Config)


def test_a_field_of_an_unsupported_type_is_our_error() -> None:
    bad = dataclasses.make_dataclass("bad", [("x", set)])
    with pytest.raises(TypeError, match="not supported"):
        check_keys({"x": 1}, {}, bad, "f")


finite = st.floats(allow_nan=False)
texts = st.text(st.characters(codec="utf-8"), max_size=12)
trains = st.builds(
    Train,
    siblings=st.integers(),
    lr=finite,
    clip=st.none() | finite,
    amp=st.booleans(),
    mode=st.sampled_from(["cm", "cu"]),
    betas=st.tuples(finite, finite),
)
configs = st.builds(
    Config,
    name=texts,
    train=trains,
    reference=st.none() | trains,
    rewards=st.lists(st.builds(Reward, name=texts, weight=finite), max_size=3).map(tuple),
    notes=st.dictionaries(texts, st.none() | finite | texts, max_size=3),
    out=st.none() | st.sampled_from([Path("a/b"), Path("/c d")]),
    stage=st.integers() | texts,
)


@given(config=configs)
def test_round_trip(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    values, lines = load_yaml(path)
    check_keys(values, lines, Config, path)
    back = to_dataclass(values, Config)
    assert back == config and repr(back) == repr(config)


def test_shared_parts_are_written_out() -> None:
    assert "&" not in dump_yaml(Config(train=(shared := Train()), reference=shared))


def test_dump_wants_an_instance() -> None:
    with pytest.raises(TypeError, match="accepted: an instance of a dataclass"):
        dump_yaml(Config)


def test_a_size_is_written_as_a_flag_has_it(tmp_path: Path) -> None:
    """`512x512`, which messages give as the example, and nothing that only looks like one."""

    @dataclass(frozen=True)
    class Sized:
        size: tuple[int, int] = (8, 8)
        betas: tuple[float, float] = (0.9, 0.999)

    file = tmp_path / "size.yaml"
    file.write_text("size: 64x48\n")
    assert to_dataclass(load_yaml(file)[0], Sized).size == (64, 48)
    for wrong in ("size: 64x48x3", "size: 64 by 48", "size: 64x", "betas: 1x1"):
        file.write_text(wrong + "\n")
        with pytest.raises(ConfigError, match=wrong.split(":")[0]):
            to_dataclass(load_yaml(file)[0], Sized)
