"""`editr2 world`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from editr2.cli.flags import SOME, Arguments, Flags, dispatch
from editr2.config.rules import folder_problem
from editr2.config.settings import SEED, TURNS


def command(arguments: Arguments) -> int:
    """the embedded world: `make` sessions on disk, `pretrain` the small policy"""
    actions: dict[str, Callable[[Arguments], int]] = {
        "make": _world_make,
        "pretrain": _world_pretrain,
    }
    return dispatch("editr2 world", actions, arguments)


def _world_make(arguments: Arguments) -> int:
    """write sessions of the shapes world as PNG and jsonl"""
    flags = Flags("editr2 world make", _world_make.__doc__ or "")
    flags.add(
        "--out",
        path=True,
        check=folder_problem,
        what="a folder",
        required=True,
        help="folder to write",
    )
    flags.add("--count", type=int, default=24, bounds=SOME, help="sessions")
    flags.add("--turns", type=int, default=3, bounds=TURNS, help="turns a session")
    flags.add(
        "--split", type=Literal["train", "heldout"], default="train", help="of the world's sessions"
    )
    flags.add("--seed", type=int, default=0, bounds=SEED, help="seed of the stream")
    options = flags.parse(arguments)
    from editr2.sessions import save_sessions
    from editr2.worlds.shapes import make_session

    seed, split, turns = options["seed"], options["split"], options["turns"]
    sessions = [make_session(seed, i, split=split, turns=turns) for i in range(options["count"])]
    print(f"{len(sessions)} sessions: {save_sessions(sessions, options['out'])}")
    return 0


def _world_pretrain(arguments: Arguments) -> int:
    """train the embedded policy from random weights on ground-truth sessions"""
    from editr2.policies.unified.pretrain import PretrainConfig, pretrain

    flags = Flags("editr2 world pretrain", _world_pretrain.__doc__ or "")
    out_help = "folder for config, tokenizer, weights and log"
    flags.add(
        "--out", path=True, check=folder_problem, what="a folder", required=True, help=out_help
    )
    flags.settings(PretrainConfig)
    options = flags.parse(arguments)
    out = Path(options.pop("out"))
    pretrain(PretrainConfig(**options), out)
    print(f"policy: {out}")
    return 0
