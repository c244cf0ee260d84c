"""Policy folders of others: whatever is broken in one is one line that names the file or the key,
never a traceback, a hang, or a policy that works by chance.

A case is a row of one of the tables: what it does to a good folder, and what the line must name.
`load` must refuse every one of them; `check`, which reads no weights, must refuse it too or pass,
and must never do anything else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editr2.check.editors import open_editor
from editr2.errors import UserError
from editr2.policies.load import load_policy

LORA = "pytorch_lora_weights.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def folders(beside) -> ModuleType:
    return beside("policy_folders")


@pytest.fixture(scope="module")
def good(tmp_path_factory, beside, folders) -> dict[str, tuple[str, Path]]:
    """Model and folder by kind of folder."""
    return folders.make(tmp_path_factory.mktemp("good"), beside)


# --------------------------------------------------------------------------------- ways to break it


def text(name: str, content: str | bytes | None) -> Break:
    """The file holds this; None: it is gone."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def cut(name: str, share: float = 0.5) -> Break:
    """Only the first part of the file is there."""

    def apply(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return apply


def values(name: str, **changes: Any) -> Break:
    """Keys of a JSON object are set; to None: taken out."""

    def apply(folder: Path) -> None:
        kept = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))

    return apply


def lora_settings(**changes: Any) -> Break:
    def apply(folder: Path) -> None:
        said = json.loads((folder / "policy.json").read_text())
        said["lora"] = {k: v for k, v in (said["lora"] | changes).items() if v is not None}
        (folder / "policy.json").write_text(json.dumps(said))

    return apply


def tensors(
    name: str,
    change: Callable[[dict[str, torch.Tensor]], Any],
    metadata: dict[str, str] | None = None,
):
    """The file holds what `change` makes of its tensors (or left of them)."""

    def apply(folder: Path) -> None:
        with safe_open(folder / name, "pt") as file:
            said = file.metadata() if metadata is None else metadata
        kept = load_file(folder / name)
        changed = change(kept)
        save_file(kept if changed is None else changed, folder / name, metadata=said)

    return apply


def _without_one(kept: dict[str, torch.Tensor]) -> None:
    kept.pop(max(kept))


def first(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    """The first tensor (by name) of several axes is another."""

    def apply(kept: dict[str, torch.Tensor]) -> None:
        key = min(key for key, t in kept.items() if t.dim() > 1)
        kept[key] = change(kept[key]).contiguous()

    return tensors(name, apply)


def _nan(t: torch.Tensor) -> torch.Tensor:
    return t.index_fill(0, torch.tensor([0]), float("nan"))


def base_is_itself(folder: Path) -> None:
    values("policy.json", base=str(folder))(folder)


def base_is_a_circle(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (other / "policy.json").write_text(
        json.dumps({"model": json.loads((folder / "policy.json").read_text())["model"]})
    )
    (other / "transformer").mkdir()
    values("policy.json", base=str(folder / ".." / folder.name))(other)
    values("policy.json", base=str(other))(folder)


LORA_FILES: dict[str, tuple[Break, str]] = {
    "gone": (text(LORA, None), LORA),
    "no bytes": (text(LORA, ""), LORA),
    "cut short": (cut(LORA), LORA),
    "a pickle": (text(LORA, b"\x80\x04]\x94." * 100), LORA),
    "no tensors": (tensors(LORA, lambda kept: {}), "no tensors"),
    "half": (tensors(LORA, lambda kept: dict(list(kept.items())[: len(kept) // 2])), "missing"),
    "without B": (
        tensors(LORA, lambda kept: {k: t for k, t in kept.items() if "lora_B" not in k}),
        "lora_B.weight",
    ),
    "one key": (tensors(LORA, lambda kept: dict(list(kept.items())[:1])), "missing"),
    "one key missing": (tensors(LORA, _without_one), "missing"),
    "another layer's, too": (
        tensors(LORA, lambda kept: kept.update({"transformer.odd.lora_A.weight": torch.zeros(2)})),
        "transformer.odd",
    ),
    "no names of ours": (
        tensors(LORA, lambda kept: {f"text_encoder.{k}": t for k, t in kept.items()}),
        "text_encoder.",
    ),
    "another rank": (
        tensors(
            LORA,
            lambda kept: {
                k: (t[:1] if "lora_A" in k else t[:, :1]).contiguous() for k, t in kept.items()
            },
        ),
        "[1, ",
    ),
    "turned around": (first(LORA, lambda t: t.T), "lora_A.weight"),
    "not a number": (first(LORA, _nan), "lora_A.weight"),
    "infinite": (first(LORA, lambda t: t * torch.inf), "lora_A.weight"),
    "whole numbers": (first(LORA, lambda t: t.int()), "I32"),
    "settings cut short": (
        tensors(LORA, lambda kept: None, {"lora_adapter_metadata": '{"transformer.r": '}),
        LORA,
    ),
    "settings of words": (
        tensors(
            LORA,
            lambda kept: None,
            {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": "x"}'},
        ),
        "lora_alpha",
    ),
}

DESCRIPTIONS: dict[str, tuple[Break, str]] = {
    "no bytes": (text("policy.json", ""), "policy.json"),
    "cut short": (cut("policy.json"), "policy.json"),
    "no text": (text("policy.json", b"\xff\xfe\x00{"), "policy.json"),
    "a list": (text("policy.json", "[]"), "policy.json"),
    "nested without end": (text("policy.json", "[" * 100_000), "policy.json"),
    "no model": (values("policy.json", model=None), "model"),
    "model is a number": (values("policy.json", model=3), "model"),
    "another model": (values("policy.json", model="kontexts"), "kontexts"),
    "no base": (values("policy.json", base=None), "base"),
    "base is a number": (values("policy.json", base=5), "base"),
    "base is empty": (values("policy.json", base=""), "base"),
    "base is nowhere": (values("policy.json", base="/no/such/folder"), "/no/such/folder"),
    "base is itself": (base_is_itself, "base"),
    "base is a circle": (base_is_a_circle, "base"),
}

LORA_SETTINGS: dict[str, tuple[Break, str]] = {
    "no lora": (values("policy.json", lora=None), "lora"),
    "lora is a list": (values("policy.json", lora=[2, 4]), "lora"),
    "no rank": (lora_settings(rank=None), "rank"),
    "rank in words": (lora_settings(rank="two"), "rank"),
    "rank 0": (lora_settings(rank=0), "rank"),
    "rank true": (lora_settings(rank=True), "rank"),
    "a rank beyond the file": (lora_settings(rank=3), "accepted: 3"),
    "a rank beyond memory": (lora_settings(rank=10**12), "accepted: 1000000000000"),
    "alpha beyond a float": (lora_settings(alpha=10**400), "alpha"),
    "alpha is not a number": (lora_settings(alpha=float("nan")), "alpha"),
    "alpha 0": (lora_settings(alpha=0), "alpha"),
    "no alpha": (lora_settings(alpha=None), "alpha"),
    "targets are a number": (lora_settings(targets=7), "targets"),
    "targets that match nothing": (lora_settings(targets="none"), "targets"),
    "targets that are no expression": (lora_settings(targets="to_(q"), "targets"),
}


def in_folder(name: str, weights: str = WEIGHTS) -> dict[str, tuple[Break, str]]:
    """What can be wrong with one component that has weights."""
    return {
        f"{name}: no config": (text(f"{name}/config.json", None), name),
        f"{name}: config cut short": (cut(f"{name}/config.json"), name),
        f"{name}: config is a list": (text(f"{name}/config.json", "[1]"), name),
        f"{name}: no weights": (text(f"{name}/{weights}", None), name),
        f"{name}: weights of no bytes": (text(f"{name}/{weights}", ""), name),
        f"{name}: weights cut short": (cut(f"{name}/{weights}"), name),
        f"{name}: no tensors": (tensors(f"{name}/{weights}", lambda kept: {}), name),
        f"{name}: a key missing": (tensors(f"{name}/{weights}", _without_one), name),
        f"{name}: another shape": (first(f"{name}/{weights}", lambda t: t[:-1]), name),
    }


TRANSFORMER = in_folder("transformer") | {
    "transformer: more blocks": (values("transformer/config.json", num_layers=3), "transformer"),
    "transformer: width in words": (
        values("transformer/config.json", attention_head_dim="wide"),
        "transformer",
    ),
    "transformer: no width": (
        values("transformer/config.json", attention_head_dim=0),
        "transformer",
    ),
}

INDEX: dict[str, tuple[Break, str]] = {
    "no index": (text("model_index.json", None), "model_index.json"),
    "index cut short": (cut("model_index.json"), "model_index.json"),
    "index is a list": (text("model_index.json", "[]"), "model_index.json"),
    "index names no autoencoder": (values("model_index.json", vae=None), "vae"),
    "index names a class that is none": (
        values("model_index.json", vae=["diffusers", "Auto"]),
        "Auto",
    ),
    "index names a module that is none": (
        values("model_index.json", vae=["nothing", "Auto"]),
        "vae",
    ),
}

OTHERS: dict[str, tuple[Break, str]] = {
    "no autoencoder": (lambda folder: shutil.rmtree(folder / "vae"), "vae"),
    "no text encoder": (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler"),
    "no words": (text("tokenizer/tokenizer.json", None), "tokenizer"),
    "tokenizer cut short": (cut("tokenizer/tokenizer.json"), "tokenizer"),
    "tokenizer of no bytes": (text("tokenizer/tokenizer.json", ""), "tokenizer"),
    "tokenizer is another thing": (text("tokenizer/tokenizer.json", "{}"), "tokenizer"),
    "tokenizer settings cut short": (cut("tokenizer/tokenizer_config.json"), "tokenizer"),
    "scheduler cut short": (cut("scheduler/scheduler_config.json"), "scheduler"),
    "scheduler in words": (
        values("scheduler/scheduler_config.json", num_train_timesteps="many"),
        "scheduler",
    ),
}


def _smaller_words(folder: Path) -> None:
    """The text encoder knows fewer words than the tokenizer."""
    file = folder / "text_encoder" / "model.safetensors"
    kept = load_file(file)
    for key, t in kept.items():
        if "embed_tokens" in key or "lm_head" in key:
            kept[key] = t[:20].contiguous()
    save_file(kept, file, metadata={"format": "pt"})
    values("text_encoder/config.json", vocab_size=20)(folder)


def _word_beyond(folder: Path) -> None:
    """As many words as the model knows, one of them numbered far beyond."""
    said = json.loads((folder / "tokenizer.json").read_text())
    word = max(said["model"]["vocab"], key=said["model"]["vocab"].get)
    said["model"]["vocab"][word] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(said))


UNIFIED: dict[str, tuple[Break, str]] = {
    **{
        f"no {name}": (text(name, None), name)
        for name in ("config.json", "tokenizer.json", "model.safetensors")
    },
    **{
        f"{name} of no bytes": (text(name, ""), name)
        for name in ("config.json", "tokenizer.json", "model.safetensors")
    },
    **{
        f"{name} cut short": (cut(name), name)
        for name in ("config.json", "tokenizer.json", "model.safetensors")
    },
    "config is a list": (text("config.json", "[]"), "config.json"),
    "unknown size": (values("config.json", width=3), "width"),
    "no size": (values("config.json", hidden_size=None), "hidden_size"),
    "size in words": (values("config.json", hidden_size="large"), "hidden_size"),
    "half a layer": (values("config.json", num_hidden_layers=1.5), "num_hidden_layers"),
    "size 0": (values("config.json", num_attention_heads=0), "num_attention_heads"),
    "no layer": (values("config.json", num_hidden_layers=-1), "num_hidden_layers"),
    "size beyond memory": (values("config.json", intermediate_size=10**15), "intermediate_size"),
    "layers beyond time": (values("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "not a number": (values("config.json", rope_theta=float("nan")), "rope_theta"),
    "another size": (values("config.json", intermediate_size=64), "mlp."),
    "another channel count": (values("config.json", latent_channels=4), "latent_channels"),
    "tokenizer is another thing": (text("tokenizer.json", "{}"), "tokenizer.json"),
    "tokenizer knows more words": (values("config.json", vocab_size=20), "vocab_size"),
    "a word beyond all": (_word_beyond, "vocab_size"),
    "no tensors": (tensors("model.safetensors", lambda kept: {}), "no tensors"),
    "a key missing": (tensors("model.safetensors", _without_one), "missing"),
    "a key too many": (
        tensors("model.safetensors", lambda kept: kept.update(odd=torch.zeros(2))),
        "odd",
    ),
    "another shape": (first("model.safetensors", lambda t: t[:-1]), "model.safetensors"),
    "whole numbers": (first("model.safetensors", lambda t: t.int()), "I32"),
}

CASES = [
    pytest.param(kind, name, *row, id=f"{kind}-{name}", marks=pytest.mark.exhaustive if i else ())
    for kinds, table in (
        (("klein-lora", "kontext-lora"), LORA_FILES),
        (("klein-lora", "klein-full"), DESCRIPTIONS),
        (("klein-lora",), LORA_SETTINGS),
        (("klein-full", "klein", "kontext", "qwen-edit"), TRANSFORMER),
        (("klein", "kontext", "qwen-edit"), in_folder("vae")),
        (("klein", "kontext", "qwen-edit"), in_folder("text_encoder", "model.safetensors")),
        (("klein", "qwen-edit"), OTHERS),
        (("klein",), INDEX | {"text encoder of fewer words": (_smaller_words, "tokenizer")}),
        (("unified",), UNIFIED),
    )
    for i, kind in enumerate(kinds)  # `make test` runs the first kind of each
    for name, row in table.items()
]


@pytest.mark.parametrize(("kind", "name", "broken", "named"), CASES)
def test_a_broken_folder_is_one_line(kind, name, broken, named, good, folders, tmp_path):
    model, source = good[kind]
    folder = shutil.copytree(source, tmp_path / "given")
    broken(folder)
    config = folders.settings(model, folder)
    with pytest.raises(UserError) as found:
        load_policy(config, trains=False)
    line = str(found.value)
    assert named in line and "\n" not in line and len(line) < 1000, line
    assert str(folder) in line, line
    try:
        open_editor(config)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)


@pytest.mark.parametrize(
    "kind", ["klein-lora", "kontext-lora", "klein-full", "klein", "kontext", "qwen-edit", "unified"]
)
def test_a_good_folder_is_none_of_them(kind, good, folders, tmp_path):
    model, source = good[kind]
    config = folders.settings(model, shutil.copytree(source, tmp_path / "given"))
    load_policy(config, trains=False)
    open_editor(config)


def _mutated(content: bytes, random: Random) -> bytes:
    """A bit turned, bytes taken out or put in, the end cut off, or a number that is another thing:
    in the first bytes, where a file says what it is."""
    end = min(len(content), 3000)
    at = random.randrange(end) if end else 0
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content[:end]))
    kind = random.choice(["bit", "out", "in", "end", "number"])
    if kind == "bit" and end:
        return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
    if kind == "out":
        return content[:at] + content[at + random.randrange(1, 20) :]
    if kind == "in":
        return content[:at] + bytes(random.choices(b'0123456789"{}[],:-.eN', k=3)) + content[at:]
    if kind == "number" and numbers:
        match = random.choice(numbers)
        odd = [b"0", b"-1", b"1e400", b"9" * 20, b"null", b'"x"', b"[]", b"true", b"1.5"]
        return content[: match.start()] + random.choice(odd) + content[match.end() :]
    return content[:at]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["unified", "klein", "klein-lora", "klein-full"])
def test_a_mutated_folder_is_one_line_or_a_policy(kind, good, folders, tmp_path):
    """150 times one file of a folder: it is loaded or refused in one line, by `check` as well."""
    random, (model, source) = Random(0), good[kind]
    said = {"taken": 0, "refused": 0}
    for i in range(150):
        folder = shutil.copytree(source, tmp_path / str(i))
        file = random.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        file.write_bytes(_mutated(file.read_bytes(), random))
        config = folders.settings(model, folder)
        for use in (partial(load_policy, config, trains=False), partial(open_editor, config)):
            try:
                use()
                said["taken"] += 1
            except UserError as error:
                assert "\n" not in str(error)
                said["refused"] += 1
        shutil.rmtree(folder)
    print(said)
    assert said["refused"] > 100
