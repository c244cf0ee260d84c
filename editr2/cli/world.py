"""`editr2 world`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editr2.cli.flags import SOME, Arguments, Flags, dispatch
from editr2.cli.loading import load_libraries
from editr2.config.fields import Bounds
from editr2.config.settings import SEED, SHARE, TURNS
from editr2.errors import ConfigError, counted

if TYPE_CHECKING:
    from editr2.sessions import Session

ANY = Bounds(at_least=0, at_most=256)


def command(arguments: Arguments) -> int:
    """the embedded world: sessions, its policy, edits, a verifier"""
    actions: dict[str, Callable[[Arguments], int]] = {
        "make": _world_make,
        "pretrain": _world_pretrain,
        "edits": _world_edits,
        "verifier": _world_verifier,
    }
    return dispatch("editr2 world", actions, arguments)


def _world_make(arguments: Arguments) -> int:
    """write sessions of the shapes world as PNG and jsonl"""
    flags = Flags(
        "editr2 world make",
        _world_make.__doc__ or "",
        [
            ("--out my_set --count 24", "of the training split"),
            ("--out my_heldout --split heldout", "whose scenes no training session has"),
        ],
    )
    flags.out()
    flags.add("--count", type=int, default=24, bounds=SOME, help="sessions")
    _add_stream(flags)
    flags.add("--seed", type=int, default=0, bounds=SEED, help="seed of the stream")
    flags.add(
        "--principles",
        action="store_true",
        help="with meta.principles of every turn, as the reward `verifier` reads them",
    )
    options = flags.parse(arguments)
    from editr2.sessions import save_sessions

    sessions = _sessions(options)
    if options["principles"]:
        from editr2.verifier.world import with_principles

        sessions = [with_principles(session) for session in sessions]
    print(f"{counted(len(sessions), 'session')}: {save_sessions(sessions, options['out'])}")
    return 0


def _add_stream(flags: Flags) -> None:
    """Which of the world's sessions."""
    flags.add("--turns", type=int, default=3, bounds=TURNS, help="turns a session")
    flags.add(
        "--split", type=Literal["train", "heldout"], default="train", help="of the world's sessions"
    )


def _sessions(options: dict[str, Any]) -> list[Session]:
    """Those that were asked for."""
    from editr2.worlds.shapes import make_session

    how = {name: options[name] for name in ("split", "turns")}
    return [make_session(options["seed"], i, **how) for i in range(options["count"])]


def _world_pretrain(arguments: Arguments) -> int:
    """train the embedded policy from random weights"""
    from editr2.policies.unified.settings import PretrainConfig

    flags = Flags(
        "editr2 world pretrain",
        _world_pretrain.__doc__ or "",
        [
            ("--out my_policy", "as the shipped one was made"),
            ("--out my_policy --steps 100 --compile false", "a trial of it"),
        ],
    )
    flags.out("folder for config, tokenizer, weights and log")
    flags.settings(PretrainConfig)
    options = flags.parse(arguments)
    load_libraries()
    out = Path(options.pop("out"))
    from editr2.policies.unified.pretrain import pretrain

    pretrain(PretrainConfig(**options), out)
    print(f"policy: {out}")
    return 0


def _world_edits(arguments: Arguments) -> int:
    """write edits with principles, traces and pairs, by rules"""
    flags = Flags(
        "editr2 world edits",
        _world_edits.__doc__ or "",
        [
            ("--out edits --count 200", "by the shipped policy, and synthetic ones"),
            ("--out edits --siblings 0", "synthetic ones alone: seconds"),
        ],
    )
    flags.out()
    flags.add("--count", type=int, default=200, bounds=SOME, help="sessions")
    _add_stream(flags)
    flags.add(
        "--siblings",
        type=int,
        default=4,
        bounds=ANY,
        help="rollouts of the policy a session; 0: synthetic edits alone",
    )
    flags.add("--policy", path=True, help="the policy's folder; none: the embedded one")
    flags.add(
        "--synthetic",
        type=int,
        default=4,
        bounds=ANY,
        help="synthetic edits of a picture and request; 0: those of the policy alone",
    )
    flags.add("--pairs", type=int, default=2, bounds=ANY, help="pairs of a picture and request")
    flags.add(
        "--noise",
        type=float,
        default=0.0,
        bounds=SHARE,
        help="share of pairs whose preference is the wrong way round",
    )
    flags.add(
        "--misread",
        type=float,
        default=0.0,
        bounds=SHARE,
        help="share of traces whose writer takes one cell for another; gold and pairs stay exact",
    )
    flags.add("--seed", type=int, default=0, bounds=SEED, help="seed of everything drawn")
    options = flags.parse(arguments)
    load_libraries()
    if not options["siblings"] and not options["synthetic"]:
        raise ConfigError("--siblings, --synthetic: 0 both (accepted: at least 1 of one of them)")
    from editr2.config import PolicyConfig
    from editr2.verifier.candidates import gather, outputs
    from editr2.verifier.world import requests
    from editr2.verifier.world_files import write_world

    seed, sessions = options["seed"], _sessions(options)
    policy = PolicyConfig(weights=options["policy"])
    siblings = options["siblings"]
    rolled = outputs(sessions, siblings, policy, seed) if siblings else None
    groups = gather(sessions, rolled, requests, options["synthetic"], seed)
    out = Path(options["out"])
    counts = write_world(
        out,
        groups,
        noise=options["noise"],
        most=options["pairs"],
        seed=seed,
        misread_share=options["misread"],
    )
    misread = f" ({counts.misread} traces misread)" if options["misread"] else ""
    print(
        f"{counted(counts.edits, 'edit')}{misread}, {counted(counts.pairs, 'pair')} "
        f"({counts.swapped} the wrong way round): {out}"
    )
    return 0


def _world_verifier(arguments: Arguments) -> int:
    """write a small verifier with random weights"""
    from editr2.verifier.settings import SmallConfig

    flags = Flags(
        "editr2 world verifier",
        _world_verifier.__doc__ or "",
        [
            ("--out start", "of the usual size"),
            ("--out start --hidden 80 --layers 2", "a smaller one"),
        ],
    )
    flags.out("folder for weights, processor and question")
    flags.settings(SmallConfig)
    options = flags.parse(arguments)
    load_libraries()
    out = Path(options.pop("out"))
    from editr2.verifier.small import write_small

    print(f"verifier: {out} ({write_small(out, SmallConfig(**options)):,} weights)")
    return 0
