"""What is wrong with a reward is said before an editor is read or anything is written; and what
its models take."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from editr2.check import scale, text
from editr2.check.devices import find_device
from editr2.check.judges import Measured, held_by, judging, measured, room
from editr2.cli.main import main
from editr2.config import Config, RewardConfig
from editr2.errors import ConfigError, UserError
from editr2.rewards.adapt import adapt
from editr2.rewards.base import Held, Item, Score
from editr2.rewards.load import load_reward
from editr2.rewards.panel import Panel
from editr2.sessions import Session
from editr2.sessions.source import open_sessions
from editr2.verifier.model import load_reader, sketch_reader
from editr2.verifier.settings import ReaderConfig


@pytest.fixture
def no_editor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading an editor's weights, and what was written of a run, fail."""
    for module in ("rl.loop", "scoring", "benchmarks.run"):
        monkeypatch.setattr(
            f"editr2.{module}.open_policy", mock.Mock(side_effect=AssertionError("an editor"))
        )
    loaded = mock.Mock(side_effect=AssertionError("a verifier's weights"))
    monkeypatch.setattr("editr2.verifier.local.load_reader", loaded)


@pytest.fixture(scope="module")
def folders(beside: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("looks")
    lookers = beside("tiny_lookers")
    return {
        "verifier": beside("tiny_verifier").write_world(root / "verifier"),
        "features": lookers.dinov3(root / "features"),
        "detector": lookers.grounding_dino(root / "detector"),
    }


# What happens to a folder


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:size])

    return change


def kind(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | {"model_type": name}))

    return change


def fewer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(max(tensors, key=lambda name: tensors[name].numel()))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder: Path) -> None:
    """Two files by the index, of which one is there."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))


def other_end(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 5}))


VERIFIERS: list[tuple[str, Callable[[Path], None], str]] = [
    ("missing", gone, ": no such folder (accepted: a folder or hub id"),
    ("empty", emptied, "accepted: a folder or hub id of a model that takes pictures"),
    ("no-model", kind("bert"), "accepted: a folder or hub id of a model that takes pictures"),
    ("settings-cut", cut("config.json", 40), "accepted: a folder or hub id"),
    ("no-tokenizer", without("tokenizer.json"), "accepted: a folder or hub id"),
    ("no-processor", without("processor_config.json"), "accepted: a folder or hub id"),
    ("no-template", without("chat_template.jinja"), "no chat template (accepted: a processor"),
    ("no-weights", without("model.safetensors"), "weights: no model.safetensors there"),
    ("weights-cut", cut("model.safetensors", 9000), "(was it cut short?)"),
    ("no-weights-but-bytes", cut("model.safetensors", 4), "(was it cut short?)"),
    ("too-few-weights", fewer, " numbers of the model's "),
    ("a-file-less", sharded, "model-00002-of-00002.safetensors: not there"),
    ("another-end", other_end, "the tokenizer ends texts with 2, generation_config with [5]"),
]

VERIFIER = ("--reward.name=verifier", "--reward.options.weights={verifier}")
APART = ('--eval.reward=[{{"name": "verifier", "options": {{"weights": "{verifier}"}}}}]',)
SCORE = ('--credit.weights={{"score": 1}}',)
SMALL = ("--out=out", "--eval.sessions=1")
REWARD, EVALUATION = "reward.options.weights", "eval.reward[0].options.weights"
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": (REWARD, ("train", *SMALL, *VERIFIER, *SCORE)),
    "train-apart": (EVALUATION, ("train", *SMALL, *APART)),
    "eval": (REWARD, ("eval", *SMALL, *VERIFIER, *SCORE)),
    "eval-apart": (EVALUATION, ("eval", *SMALL, *APART)),
    "benchmark": (REWARD, ("benchmark", "world", "--sessions=1", "--out=out", *VERIFIER)),
    "benchmark-against": (
        "against.options.weights",
        (
            *("benchmark", "world", "--sessions=1", "--out=out"),
            *("--against.name=verifier", "--against.options.weights={verifier}"),
        ),
    ),
    "benchmark-of-rewards": (REWARD, ("benchmark", "pairs.jsonl", "--out=out", *VERIFIER)),
    "judge": (REWARD, ("judge", "--outputs=made", "--out=out", *VERIFIER)),
    "check": (REWARD, ("check", *VERIFIER, *SCORE)),
    "check-apart": (EVALUATION, ("check", *APART)),
}
"""By name: the setting that is wrong, and the words."""


def said_of(words: tuple[str, ...], given: dict[str, Path], capsys: Any) -> list[str]:
    """Lines of the error of a command in an empty working folder, in which it leaves nothing."""
    before = sorted(Path.cwd().rglob("*"))
    status = main([word.format(**given) for word in words])
    said: str = capsys.readouterr().err
    assert status == 2 and "Traceback" not in said, said
    assert sorted(Path.cwd().rglob("*")) == before, "something was written"
    lines = [line for line in said.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("note: ")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the commands ask for beside a reward."""
    (tmp_path / "made").mkdir()
    pair = {"id": "p", "image": "a.png", "win": "a.png", "lose": "a.png", "instruction": "add it"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("no_editor")
@pytest.mark.parametrize(
    ("what", "command"),
    # Everything for one command, and one of it for every command.
    [(row, "train") for row in VERIFIERS] + [(VERIFIERS[8], name) for name in COMMANDS],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_verifier_that_is_none(
    what: Any,
    command: str,
    folders: dict[str, Path],
    here: Path,
    tmp_path_factory: Any,
    capsys: Any,
) -> None:
    _, change, says = what
    folder = shutil.copytree(folders["verifier"], tmp_path_factory.mktemp("broken") / "verifier")
    change(folder)
    at, words = COMMANDS[command]
    (line,) = said_of(words, {"verifier": folder}, capsys)
    assert f"{at}: {folder}" in line and says in line


LOOKERS: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("no-features", "features", emptied, "features: {}: config.json: "),
    ("other-features", "features", kind("bert"), "features: {} is a bert (accepted: dinov3_vit"),
    ("features-cut", "features", cut("model.safetensors", 900), "features: {}: weights: "),
    ("fewer-features", "features", fewer, "numbers of the model's"),
    ("no-detector", "detector", emptied, "detector: {}: config.json: "),
    ("other-detector", "detector", kind("bert"), "detector: {} is a bert (accepted: grounding"),
    ("detector-cut", "detector", cut("model.safetensors", 900), "detector: {}: weights: "),
    ("no-words", "detector", without("tokenizer.json", "vocab.txt"), "detector: {}: tokenizer: "),
]


@pytest.mark.usefixtures("no_editor")
@pytest.mark.parametrize("row", LOOKERS, ids=lambda row: row[0])
def test_something_to_look_with_that_is_none(
    row: Any, folders: dict[str, Path], here: Path, tmp_path_factory: Any, capsys: Any
) -> None:
    _, which, change, says = row
    broken = shutil.copytree(folders[which], tmp_path_factory.mktemp("broken") / which)
    change(broken)
    words = ("train", *SMALL, "--reward.name=edit-r2", "--reward.options.scores=CC")
    words += ("--reward.options.features={features}", "--reward.options.detector={detector}")
    given = folders | {which: broken}
    (line,) = said_of((*words, '--credit.weights={{"CC": 1}}'), given, capsys)
    assert says.format(broken) in line


NAMES: list[tuple[str, tuple[str, ...], str]] = [
    ("unknown", ("train", "--reward.name=nobody"), "reward.name: 'nobody'"),
    ("unknown-apart", ("eval", '--eval.reward=[{{"name": "nobody"}}]'), "eval.reward[0].name"),
    ("no-judge", ("train", "--reward.name=edit-r2"), "reward.options.url"),
    (
        "weights",
        ("train", *VERIFIER, "--reward.options.scores=score,keep"),
        "credit.weights: ['CC', 'GA', 'IF']",
    ),
    ("weights-of-none", ("train", '--credit.weights={{"XX": 1}}'), "credit.weights: ['XX']"),
    ("eval-weights", ("eval", '--credit.weights={{"XX": 1}}'), "credit.weights: ['XX']"),
    ("best", ("train", "--checkpoint.best=nothing", "--eval.every=1"), "checkpoint.best"),
    ("best-apart", ("train", "--checkpoint.best=eval.XX", "--eval.every=1"), "checkpoint.best"),
    ("pruned", ("train", "--rollout.prune=estimate"), "rollout.prune: estimate"),
    ("filter", ("train", *VERIFIER, *SCORE, "--credit.filter=true"), "credit.filter: "),
]
"""What names no reward, or no score of one."""


@pytest.mark.usefixtures("no_editor")
@pytest.mark.parametrize("row", NAMES, ids=lambda row: row[0])
def test_names_of_rewards_that_are_none(
    row: Any, folders: dict[str, Path], here: Path, capsys: Any
) -> None:
    _, words, says = row
    line = said_of((words[0], *SMALL, *words[1:]), folders, capsys)[0]
    assert says in line


@pytest.mark.usefixtures("no_editor")
def test_a_folder_that_is_whole_passes(folders: dict[str, Path], here: Path) -> None:
    """Up to the editor, which is read next."""
    _, words = COMMANDS["train"]
    with pytest.raises(AssertionError, match="an editor"):
        main([word.format(**folders) for word in words])


def test_a_benchmark_that_is_judged_needs_no_judge(here: Path, capsys: Any) -> None:
    """Its page is made again where a judge's models are not, as on another machine."""
    words = ["benchmark", "world", "--sessions=1", "--turns=1", "--rollout.steps=2", "--out=out"]
    assert main(words) == 0, capsys.readouterr()
    gone = mock.Mock(side_effect=ConfigError("a model that is not here"))
    with mock.patch("editr2.rewards.panel.Panel.quick_look", gone):
        assert main(words) == 0, capsys.readouterr()
        assert main([*words[:-1], "--out=other"]) == 2


def in_shards(folder: Path, _: Path) -> str:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return str(folder)


def pickled(folder: Path, _: Path) -> str:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return str(folder)


def an_adapter(folder: Path, _: Path) -> str:
    """As peft saves one: its base lies elsewhere."""
    peft = pytest.importorskip("peft")
    base = shutil.copytree(folder, folder.with_name("base"))
    model = AutoModelForImageTextToText.from_pretrained(base)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / name).unlink()
    kind = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(model, kind).save_pretrained(folder)
    return str(folder)


def of_the_hub(folder: Path, hub: Path) -> str:
    """Downloaded before; what ends a text stands in generation_config.json alone."""
    there = hub / "models--some--verifier"
    (there / "refs").mkdir(parents=True)
    (there / "refs" / "main").write_text("abc")
    kept = shutil.copytree(folder, there / "snapshots" / "abc")
    said = json.loads((kept / "config.json").read_text())
    said["text_config"]["eos_token_id"] = said["eos_token_id"] = 5
    (kept / "config.json").write_text(json.dumps(said))
    return "some/verifier"


@pytest.mark.parametrize("form", [in_shards, pickled, an_adapter, of_the_hub])
def test_a_verifier_that_can_be_loaded_passes(
    form: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = shutil.copytree(folders["verifier"], tmp_path / "verifier")
    given = ReaderConfig(weights=form(folder, tmp_path / "hub"), lora_rank=0)
    load_reader(given, trains=False)
    sketch_reader(given)


# What models of rewards take


@pytest.fixture(scope="module")
def session() -> Session:
    c = Config()
    return open_sessions(c.data, c.rollout, c.eval, seed=5, size=None, wants=("principles",))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [4, 16])
def test_a_verifier_takes_what_it_says(
    dtype: str, rows: int, folders: dict[str, Path], session: Session
) -> None:
    """Weights to the byte; what it allocates while it answers, as the profiler saw it."""
    options = {"weights": str(folders["verifier"]), "max_tokens": 24, "rows": rows, "dtype": dtype}
    panel = load_reward(RewardConfig(name="verifier", options=options))
    with mock.patch("editr2.verifier.local.load_reader", side_effect=AssertionError):
        (held,) = held_by(panel.members[0], session) or ()
    verifier = panel.members[0].given
    module = verifier.local.load().module
    tensors = [*module.parameters(), *module.buffers()]
    assert held.weights == sum(x.numel() * x.element_size() for x in tensors)
    item = Item(session, np.stack([session.image] * len(session.turns)))
    with torch.profiler.profile(profile_memory=True) as profile:
        verifier.judge([item])
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    assert held.working == pytest.approx(max(np.cumsum(changes)), rel=0.1)


def test_a_verifier_that_does_not_run_without_numbers_is_not_refused(
    folders: dict[str, Path], session: Session
) -> None:
    options = {"weights": str(folders["verifier"]), "max_tokens": 24}
    panel = load_reward(RewardConfig(name="verifier", options=options))
    with mock.patch("editr2.verifier.local.answering", side_effect=AttributeError("width")):
        (held,) = held_by(panel.members[0], session) or ()
    assert held.weights > 0 and held.working is None


def test_what_looks_takes_its_weights(folders: dict[str, Path], session: Session) -> None:
    options = {"scores": ["CC"], "device": "cpu"} | {
        name: str(folders[name]) for name in ("features", "detector")
    }
    member = load_reward(RewardConfig(name="edit-r2", options=options)).members[0]
    found = {held.name: held for held in held_by(member, session) or ()}
    eyes = member.given.eyes
    for name, model in (("features", eyes.encoder.model), ("detector", eyes.detector.model)):
        with model.held() as (module, _):
            tensors = [*module.parameters(), *module.buffers()]
            assert found[name].weights == sum(x.numel() * x.element_size() for x in tensors)
    height, width = eyes.encoder.sides()
    assert found["features"].working > 16 * 3 * height * width * 4  # the pictures themselves
    assert found["detector"].working is None


class Holds:
    """A reward with models."""

    names = ("IF",)

    def __init__(self, *held: Held, concurrency: int | None = None) -> None:
        self.held, self.concurrency = held, concurrency

    def models_held(self, items: Any) -> Any:
        return self.held

    def judge(self, items: Any) -> Any:
        return [[{"IF": Score(1.0)} for _ in item.asked] for item in items]


W, A = 100, 7


@pytest.mark.parametrize(
    ("device", "gpu", "processes", "found"),
    [
        ("trainer", True, 1, {"lent": W, "after": A, "host": W}),
        ("trainer", True, 4, {"lent": W, "after": A, "host": 4 * W}),
        ("trainer", True, 16, {"lent": W, "after": A, "host": 8 * W}),
        ("trainer", False, 1, {"stays": W, "after": A}),
        ("cuda", True, 1, {"stays": W, "after": A}),
        ("cuda:0", True, 4, {"stays": 4 * W, "after": 4 * A}),
        ("cuda:1", True, 1, {}),
        ("cuda:1", True, 2, {"stays": 2 * W, "after": 2 * A}),
        ("cpu", True, 2, {"host": 2 * W, "host_working": 2 * A}),
        ("cpu", False, 1, {"stays": W, "after": A}),
    ],
)
def test_where_models_of_rewards_are(
    device: str, gpu: bool, processes: int, found: dict[str, int], session: Session
) -> None:
    one = adapt(Holds(Held("eye", device, W, A)))
    m = Measured(one, 0.0, [], held_by(one, session))
    every = dict.fromkeys(("stays", "lent", "beside", "after", "host", "host_working"), 0)
    said = vars(room([m], gpu, processes)).copy()
    parts = said.pop("parts")
    assert said == every | found
    assert sum(parts.values()) == sum(
        count for name, count in found.items() if not name.startswith("host")
    )
    # Two that answer after the rollout do so one after the other; beside it, both at once.
    beside = adapt(Holds(Held("eye", device, W, A), concurrency=2))
    both = room([m, m, Measured(beside, 0.0, [], held_by(beside, session))] * 2, gpu, processes)
    assert both.after == found.get("after", 0) and both.beside == 2 * found.get("after", 0)


def test_check_says_what_a_verifier_takes(
    folders: dict[str, Path],
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A line of its own, and in the most that is alive; lent, not in training."""
    monkeypatch.setattr("editr2.check.text.levers", lambda *_: [])  # which take long
    small = ["--rollout.sessions=1", "--rollout.siblings=2", "--policy.intent=false"]
    given = {"weights": str(folders["verifier"]), "max_tokens": 16, "rows": 2}
    said = {}
    never = mock.Mock(side_effect=AssertionError("loaded"))
    monkeypatch.setattr("editr2.verifier.local.load_reader", never)
    monkeypatch.setattr("editr2.check.judges.SMALL", 0)  # a small one is asked
    for name, words in {
        "none": [],
        "lent": ["--reward.name=verifier", f"--reward.options={json.dumps(given)}"],
    }.items():
        weights = ['--credit.weights={"score": 1}'] if words else []
        main(["check", "--gpu", "h100", *small, *words, *weights])
        said[name] = capsys.readouterr().out.splitlines()
    lines = [line.strip() for line in said["lent"]]
    (line,) = [one for one in lines if one.startswith("verifier (reward), weights")]
    assert line.endswith("MiB  (on the host while it trains)")
    assert any(one.startswith("verifier (reward), answering") for one in lines)
    assert any(one.startswith("models      verifier of score, on this device") for one in lines)
    alive = {
        name: {
            one.split()[4]: float(one.split()[5])
            for one in map(str.strip, lines)
            if one.startswith("alive at most in")
        }
        for name, lines in said.items()
    }
    assert "judging" not in alive["none"] and alive["lent"]["judging"] > 0
    assert alive["lent"]["rollout"] > alive["none"]["rollout"]
    assert alive["lent"]["train"] == alive["none"]["train"]
    assert not any("(reward)" in one or "models  " in one for one in said["none"])
    # Nor is it loaded for a GPU that is not here: how long it takes is estimated.
    (at,) = [n for n, one in enumerate(lines) if one.startswith("judges      score")]
    assert float(lines[at + 1].partition("at once, ")[2].split()[0]) > 0
    assert lines[at + 2].startswith("estimated for h100, by traces of all their tokens; it was not")
    assert any("time on h100 (reward: waiting, estimated)" in one for one in lines)


class Member:
    """Of a panel, as `judging` looks at it."""

    title, names, calls_a_turn, by_turn, batch = "reward.name: 'x'", ("IF",), 0, False, None

    def __init__(self, fills: int = 1, concurrency: int | None = None) -> None:
        self.fills, self.concurrency = fills, concurrency


@pytest.mark.parametrize(
    ("fills", "rollouts", "chunks", "turns"),
    [
        (1, 6, 1, 18),
        (32, 2, 1, 32),  # a batch that is filled up takes as long as a full one
        (32, 16, 1, 64),
        (32, 16, 8, 8 * 32),  # and each chunk's is
        (10, 8, 2, 2 * 20),
    ],
)
def test_a_batch_that_is_filled_up_takes_as_long_as_a_full_one(
    fills: int, rollouts: int, chunks: int, turns: int
) -> None:
    m: Any = Measured(Member(fills), 0.5, [])  # type: ignore[arg-type]
    assert judging(m, rollouts, 1, 3, chunks, 10.0).seconds == 0.5 * turns


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (lambda speed: 1 / 0, "models_held(): turn raised ZeroDivisionError"),
        (0.5, "models_held(): turn raised TypeError"),
        (lambda speed: None, "models_held(): turn raised TypeError"),
        (lambda speed: float("nan"), "models_held(): turn: nan (accepted: seconds, from 0)"),
        (lambda speed: -1.0, "models_held(): turn: -1.0 (accepted: seconds, from 0)"),
    ],
)
def test_a_plug_in_that_says_nonsense_of_its_seconds(
    turn: Any, said: str, session: Session
) -> None:
    panel = Panel([adapt(Holds(Held("eye", "trainer", W, A, turn=turn)))])
    with pytest.raises(UserError, match=re.escape(said)):
        measured(panel, session, find_device("h100"))
    (m,) = measured(panel, session, find_device("cpu"))  # where it is asked
    assert not m.estimated


@pytest.mark.parametrize("device", ["trainer", "cpu"])
def test_a_small_verifier_is_asked_and_its_seconds_estimated(
    device: str, folders: dict[str, Path], session: Session
) -> None:
    options = {"weights": str(folders["verifier"]), "max_tokens": 16, "rows": 2, "device": device}
    panel = load_reward(RewardConfig(name="verifier", options=options))
    with mock.patch("editr2.verifier.local.load_reader", wraps=load_reader) as loading:
        (m,) = measured(panel, session, find_device("h100"))
    assert loading.called
    assert m.estimated == (device == "trainer") and m.turn > 0


def test_what_is_said_of_estimated_judges() -> None:
    """Of rewards and of evaluators; one in process has no server that many would ask."""
    here, there = (Measured(Member(), 0.5, ["a note"], estimated=e) for e in (False, True))  # type: ignore[arg-type]
    result: Any = SimpleNamespace(seconds={"rollout": 1.0, "encode": 1.0})
    asked = judging(here, 2, 2, 3.0, 1, 1.0)
    for judges, waited, calls in (
        ([], "left out", "left out"),
        ([here], "waiting, as long as it took here", "2 calls at once"),
        ([there], "waiting, estimated", "in every process, on its own device"),
        ([there, here], "waiting, as long as it took here or estimated", "2 calls at once"),
    ):
        result.judges = [(m, asked) for m in judges]
        assert text._waited(result, ()) == waited
        assert scale._asked(result, Config(), [3], 2).startswith(calls)
    result.judges = [(here, asked)]
    assert text._waited(result, [there]) == "waiting, as long as it took here or estimated"
    assert text._evaluators([there]) == ["evaluators  IF: a note"]
