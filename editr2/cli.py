"""The command line. Heavy imports happen inside the commands, so that `--help` and `doctor` answer
at once."""

from __future__ import annotations

import sys

from editr2.machine import choose_waiting, open_streams, starting

if __name__ == "__main__":  # as torchrun starts it; `editr2` starts `editr2.__main__`
    choose_waiting()  # before the imports below load torch

import errno
import json
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

with starting(__name__ == "__main__"):  # torch takes seconds to load
    from editr2.config import (
        PRESETS,
        SEED,
        TURNS,
        Config,
        check_config,
        folder_problem,
        preset_config,
        replace_nested,
    )
    from editr2.errors import ConfigError, UserError, one_line
    from editr2.fields import Bounds, Wrong, field_problems
    from editr2.flags import Flags, values_of

Arguments = Sequence[str]

_SOME = Bounds(at_least=1, at_most=1_000_000)


def run_config(
    prog: str,
    description: str,
    arguments: Arguments,
    extra: Sequence[tuple[str, dict]] = (),
    *,
    strict: bool = True,
) -> tuple[Config, dict[str, Any]]:
    """(Config, the values of `extra` flags) from defaults, `--preset`, `--config` and flags, in
    this order.

    strict: raises `ConfigError` for the first value that its field does not accept, with the file's
    line where it is from one. Otherwise such values are left as they are, for `config_problems` to
    say all of them.
    """
    from editr2.yaml_config import check_keys, load_yaml, place_of

    description += " `--data PATH` is short for `--data.path PATH`."
    flags = Flags(prog, description)
    flags.add("--preset", help=f"start from a preset: {', '.join(PRESETS)}")
    flags.add("--config", path=True, help="a YAML file with any of the fields below")
    for name, options in extra:
        flags.add(name, **options)
    flags.settings(Config)
    found = flags.given(
        [
            f"--data.path{w[6:]}" if w == "--data" or w.startswith("--data=") else w
            for w in arguments
        ]
    )
    beside = values_of(flags.own(), [(option, text) for option, text in found if not option.group])
    config = preset_config(beside.pop("preset"))
    file = beside.pop("config")
    if file is not None:
        values, lines = load_yaml(file)
        check_keys(values, lines, Config, file)
        config = replace_nested(config, values)
        for key, problem in field_problems(config) if strict else ():
            raise ConfigError(f"{place_of(file, lines, key)}: {problem}")
    for option, text in found:
        if not option.group:
            continue
        try:
            value = option.read(text, check=strict)
        except Wrong as wrong:
            if strict:
                raise ConfigError(wrong.problem) from None
            value = text
        config = _with(config, option.key.split("."), value)
    return config, beside


def _with(config: Any, path: Sequence[str], value: Any) -> Any:
    """A copy with the value at a path of fields, or of a field and an entry of its mapping."""
    name, *rest = path
    if isinstance(config, dict):
        return {**config, ".".join(path): value}
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})


# ----------------------------------------------------------------------------------------- commands


def command_train(arguments: Arguments) -> int:
    """multi-turn RL from start to report; run again to resume"""
    profile = (
        "--profile",
        {"action": "store_true", "help": "print the seconds of an iteration by phase at the end"},
    )
    told = (
        "go on although this differs from the run that is resumed: sessions, heldout, weights, "
        "reward, or a setting"
    )
    anyway = (
        "--resume-anyway",
        {"type": str, "action": "append", "help": f"{told}; again, or with commas, for more"},
    )
    config, extra = run_config(
        "editr2 train", "Train an editor on multi-turn sessions.", arguments, [profile, anyway]
    )
    insisted = [
        name.strip()
        for names in extra["resume_anyway"] or ()
        for name in names.split(",")
        if name.strip()
    ]
    from editr2.trainer import train

    train(config, profile=bool(extra["profile"]), resume_anyway=insisted)
    return 0


def command_check(arguments: Arguments) -> int:
    """find what is wrong with a run before it starts; what it takes in memory and time"""
    extra: list[tuple[str, dict]] = [
        (
            "--gpu",
            {
                "type": str,
                "default": "h100",
                "help": "to estimate for: h100, rtx4090, ... or cpu (this one)",
            },
        ),
        (
            "--processes",
            {
                "type": int,
                "default": 1,
                "bounds": _SOME,
                "help": "that torchrun will start, one a GPU",
            },
        ),
        (
            "--dry-run",
            {"action": "store_true", "help": "then train two iterations into a temporary folder"},
        ),
    ]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    description = (
        "Check the settings, data and reward of a run and estimate its memory and time; loads no "
        "weights."
    )
    config, given = run_config("editr2 check", description, arguments, extra, strict=False)
    from editr2.preflight import preflight

    report = preflight(config, given["gpu"], given["processes"])
    print("\n".join(report.problems), file=sys.stderr, end="\n" if report.problems else "")
    if report.problems:
        return 2
    print("\n".join(report.lines))
    if given["dry_run"]:
        import tempfile

        from editr2.preflight import dry_run

        with tempfile.TemporaryDirectory(prefix="editr2-check-") as folder:
            print("\n".join(["", *dry_run(config, folder)]))
    return 0 if report.fits else 2


def command_eval(arguments: Arguments) -> int:
    """score a policy on held-out sessions"""
    config, _ = run_config(
        "editr2 eval", "Score a policy on held-out sessions (see --eval.*, --data.*).", arguments
    )
    config = check_config(config, "eval")
    from editr2.data import open_sessions
    from editr2.evaluate import evaluate
    from editr2.policies.load import open_policy
    from editr2.preflight.rules import check_run
    from editr2.processes import open_processes
    from editr2.rewards.base import weight_vector
    from editr2.rewards.load import load_reward
    from editr2.schedule import eval_sampler, own_schedule

    processes = open_processes()  # first: it says which device is this process's
    reward = load_reward(config.reward)
    weight_vector(reward.names, config.credit.weights)  # before weights are read, as in training
    policy = open_policy(config.policy, processes, trains=False)
    own = own_schedule(policy)
    check_run(config, reward.names, own, processes=processes.count, command="eval")
    source = open_sessions(config, policy)
    sampler = eval_sampler(config, own).to(processes.device)
    row = evaluate(policy, reward, source.heldout, sampler, config, processes).row(0, "eval")
    if processes.main:
        print(evaluation_table(row))
    return 0


def evaluation_table(row: dict[str, Any]) -> str:
    """Mean and standard error by turn, as text."""
    names = [key for key in row if key.endswith("_turn")]
    lines = [
        f"{row['sessions']} sessions",
        "turn    " + "".join(f"{n.removesuffix('_turn'):>18}" for n in names),
    ]
    for t in range(len(row[names[0]])):
        cells = []
        for name in names:
            mean, se = row[name][t]["mean"], row[name][t]["se"]
            cells.append(
                "-" if mean is None else f"{mean:.3f}" + ("" if se is None else f" +- {se:.3f}")
            )
        lines.append(f"{t + 1:<8}" + "".join(f"{c:>18}" for c in cells))
    if "marginal_turn" in names:
        lines.append("marginal: the share of turns with IF = 1, whatever came before")
    if row["success"]["mean"] is not None:
        lines.append(f"sessions with every turn right: {row['success']['mean']:.1%}")
    for mode, part in row["by_mode"].items():
        if part["success"] is not None:
            lines.append(f"  {mode}: {part['success']:.1%}")
    if row["intents_right"] is not None:
        lines.append(f"intents equal to the known ones: {row['intents_right']:.1%}")
    if row["failed_scores"]:
        lines.append(
            f"turns without a score: {row['failed_scores']}; first: {row['first_failure']}"
        )
    if row["not_applicable"]:
        lines.append(f"turns to which a reward does not apply: {row['not_applicable']}")
    return "\n".join(lines)


def command_rollout(arguments: Arguments) -> int:
    """edit sessions and write the images, without training"""
    config, _ = run_config(
        "editr2 rollout",
        "Edit sessions turn by turn and write images and outputs.jsonl into --out.",
        arguments,
    )
    config = check_config(config, "rollout")
    from PIL import Image

    from editr2.data import open_sessions
    from editr2.policies.load import open_policy
    from editr2.preflight.rules import check_run
    from editr2.processes import open_processes
    from editr2.rollout import Seeds, chunks, rollout_chunk
    from editr2.schedule import eval_sampler, own_schedule

    processes = open_processes()
    policy = open_policy(config.policy, processes, trains=False)
    own = own_schedule(policy)
    check_run(config, None, own, processes=processes.count, command="rollout")
    sessions = open_sessions(config, policy).heldout
    sampler = eval_sampler(config, own).to(processes.device)
    out, mine = Path(config.out), processes.share(len(sessions))
    (out / "images").mkdir(parents=True, exist_ok=True)
    parts = [
        out / "outputs.jsonl",
        *(out / f"outputs.{i}.jsonl" for i in range(1, processes.count)),
    ]
    with parts[processes.index].open("w") as file:
        for chunk in chunks(
            sessions[mine], range(len(sessions))[mine], 1, 4 * config.rollout.groups_per_batch
        ):
            rollout_chunk(
                policy, chunk, sampler, Seeds(config.seed, "rollout"), config.policy, greedy=True
            )
            for i, session in enumerate(chunk.sessions):
                turns = []
                for t, image in enumerate(chunk.images_of(i)):
                    name = f"images/{chunk.ordinals[i]:05d}_t{t + 1}.png"
                    Image.fromarray(image).save(out / name)
                    record = chunk.turns[t]
                    at = int((record.rollout == i).nonzero()[0, 0])
                    intent = record.intents[at] if record.intents is not None else None
                    turns.append(
                        {
                            "instruction": session.turns[t].instruction,
                            "intent": intent.text if intent else None,
                            "image": name,
                        }
                    )
                file.write(json.dumps({"id": session.id, "turns": turns}) + "\n")
    processes.wait()
    if processes.main:
        with parts[0].open("a") as file:
            for part in parts[1:]:
                file.write(part.read_text())
                part.unlink()
        print(f"{len(sessions)} sessions: {parts[0]}")
    return 0


def command_report(arguments: Arguments) -> int:
    """write report.html of a run's folder again"""
    flags = Flags("editr2 report", "Write the run's report.html.")
    flags.add("run", path=True, help="a run's folder")
    run = flags.parse(arguments)["run"]
    from editr2.report import build_report

    print(f"report: {build_report(run)}")
    return 0


def command_export(arguments: Arguments) -> int:
    """write a run's policy for other programs, with proof that they load the same"""
    flags = Flags("editr2 export", "Write a run's policy for others.")
    flags.add("run", path=True, help="a run's folder; its newest checkpoint is taken")
    flags.add("--out", path=True, required=True, help="folder to write, new or empty")
    flags.add("--weights", help="ema (averaged; the default where there is one) or live")
    flags.add(
        "--merge", action="store_true", help="add LoRA to the weights it adapts and write them all"
    )
    options = flags.parse(arguments)
    from editr2.export import export

    done = export(
        Path(options["run"]),
        Path(options["out"]),
        weights=options["weights"],
        merge=options["merge"],
    )
    print(done)
    return 0


def command_doctor(arguments: Arguments) -> int:
    """what works on this machine, and why the rest does not"""
    Flags("editr2 doctor", "What is available.").parse(arguments)
    from editr2.doctor import main as doctor

    return doctor()


def command_data(arguments: Arguments) -> int:
    """sets of sessions: `import` a public one, `validate` one on disk"""
    actions: dict[str, Callable[[Arguments], int]] = {
        "import": _data_import,
        "validate": _data_validate,
    }
    return _dispatch("editr2 data", actions, arguments)


def _data_import(arguments: Arguments) -> int:
    """write a public multi-turn set as sessions.jsonl and images (docs/data.md)"""
    from editr2.importers import FORMATS, import_sessions

    flags = Flags("editr2 data import", _data_import.__doc__ or "")
    flags.add("format", among=lambda: FORMATS, help="the set's")
    flags.add("source", path=True, help="the set's file or folder, or hf:owner/name:split")
    flags.add(
        "--out",
        path=True,
        check=folder_problem,
        what="a folder",
        required=True,
        help="folder to write",
    )
    flags.add(
        "--images",
        path=True,
        help="folder of the images, when they are not where the release has them",
    )
    flags.add(
        "--mode", type=Literal["cm", "cu"], help="of every session, in place of what the set says"
    )
    flags.add("--limit", type=int, bounds=_SOME, help="only the first so many sessions")
    options = flags.parse(arguments)
    format, source, out = (options.pop(name) for name in ("format", "source", "out"))
    print(f"sessions: {import_sessions(format, source, out, **options)}")
    return 0


def _data_validate(arguments: Arguments) -> int:
    """everything that is wrong with a set of sessions, with its line"""
    flags = Flags("editr2 data validate", _data_validate.__doc__ or "")
    flags.add(
        "path", path=True, help="a sessions.jsonl, a folder that holds one, or hf:owner/name:split"
    )
    path = flags.parse(arguments)["path"]
    from editr2.sessions import survey

    found = survey(path)
    print("\n".join(found.problems) if found.problems else found)
    return 2 if found.problems else 0


def command_world(arguments: Arguments) -> int:
    """the embedded world: `make` sessions on disk, `pretrain` the small policy"""
    actions: dict[str, Callable[[Arguments], int]] = {
        "make": _world_make,
        "pretrain": _world_pretrain,
    }
    return _dispatch("editr2 world", actions, arguments)


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
    flags.add("--count", type=int, default=24, bounds=_SOME, help="sessions")
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
    from editr2.worlds.pretrain import PretrainConfig, pretrain

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


def command_reproduce(arguments: Arguments) -> int:
    """the papers' comparisons on the world: train every arm, write tables with intervals; run again
    to resume"""
    from editr2.reproduce.arms import Settings, find_arms

    docs_help = "folder of reproduction.md, its plots and its rows"
    flags = Flags("editr2 reproduce", command_reproduce.__doc__ or "")
    flags.add(
        "--out",
        path=True,
        check=folder_problem,
        what="a folder",
        default="runs/reproduce",
        help="folder of the runs",
    )
    flags.add(
        "--docs", path=True, check=folder_problem, what="a folder", default="docs", help=docs_help
    )
    flags.add("--arms", help="comma-separated names; all of them if not given")
    flags.add("--seeds", type=int, default=3, bounds=_SOME, help="training seeds of every arm")
    flags.add(
        "--jobs", type=int, default=2, bounds=_SOME, help="runs side by side; they share the cores"
    )
    flags.add("--report-only", action="store_true", help="write the page from the rows there are")
    flags.settings(Settings)
    options = flags.parse(arguments)
    out, docs, report_only = (
        Path(options.pop("out")),
        Path(options.pop("docs")),
        options.pop("report_only"),
    )
    arms, seeds, jobs = find_arms(options.pop("arms")), options.pop("seeds"), options.pop("jobs")
    from editr2.reproduce.page import write_page
    from editr2.reproduce.runs import reproduce

    failures = (
        []
        if report_only
        else reproduce(out, docs, Settings(**options), arms=arms, seeds=seeds, jobs=jobs)
    )
    if failures:
        print(f"failed: {', '.join(failures)}", file=sys.stderr)
    if not failures or (docs / "reproduction.jsonl").exists():
        print(f"page: {write_page(docs)}")
    return 1 if failures else 0


COMMANDS: dict[str, Callable[[Arguments], int]] = {
    "train": command_train,
    "check": command_check,
    "eval": command_eval,
    "rollout": command_rollout,
    "report": command_report,
    "export": command_export,
    "reproduce": command_reproduce,
    "doctor": command_doctor,
    "data": command_data,
    "world": command_world,
}


STOPPED = {
    "train": "nothing was trained by this start; the same command begins again, or goes on from "
    "the newest checkpoint",
    "check": "nothing was written; start it again",
    "eval": "nothing was written; start it again",
    "rollout": "what is in --out is not whole; the same command begins again",
    "reproduce": "finished runs stand; the same command trains the rest",
}
"""What is true of a command that Ctrl-C ended. The trainer itself says what it saved
(`editr2.run.stop`)."""


def _dispatch(
    prog: str, commands: dict[str, Callable[[Arguments], int]], arguments: Arguments
) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(f"usage: {prog} COMMAND [options]   ({prog} COMMAND --help tells its options)\n")
        for name, command in commands.items():
            print(f"  {name:<10} {command.__doc__}")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        raise ConfigError(f"command: {arguments[0]!r} (accepted: {', '.join(commands)})")
    return commands[arguments[0]](arguments[1:])


_REMEDIES = {
    errno.ENOSPC: "the disk is full; what was saved before stands",
    errno.EDQUOT: "the disk is full; what was saved before stands",
    errno.EACCES: "permission denied (accepted: a file or folder that is yours to read and write)",
    errno.EPERM: "permission denied (accepted: a file or folder that is yours to read and write)",
    errno.EROFS: "its file system cannot be written (accepted: another folder)",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "is below a file (accepted: a folder)",
    errno.EISDIR: "is a folder (accepted: a file)",
    errno.EEXIST: "is there already, and no folder (accepted: another name)",
    errno.ENAMETOOLONG: "the name is too long (accepted: names of at most 255 bytes)",
    errno.EMFILE: "too many open files (accepted: fewer at once, or a higher limit by ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "no memory is left",
    errno.EIO: "the device does not read or write; what was saved before stands",
}


def os_problem(error: OSError) -> str:
    """What the system refused, in one line: the file, and what to do."""
    what = _REMEDIES.get(error.errno or 0) or error.strerror or one_line(error)
    names = [
        os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)
        for name in (error.filename, error.filename2)
        if name is not None
    ]
    where = " -> ".join(names) or ("output" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "")
    return f"{where}: {what}" if where else what


def main(arguments: Arguments | None = None) -> int:
    """Entry point: 0 when all went well, 2 with one line on standard error for anything the user
    can mend."""
    open_streams()
    warnings.filterwarnings("default", category=UserWarning, module="editr2")
    given = sys.argv[1:] if arguments is None else arguments
    try:
        status = _dispatch("editr2", COMMANDS, given)
        sys.stdout.flush()  # while there is somebody to say that it cannot be written
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read our output has enough of it. Python would complain once more when it flushes
        # at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports SIGPIPE
    except OSError as error:
        print(f"error: {os_problem(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        name = given[0] if given else ""
        # `check` trains, too, in a folder that is gone now.
        said = str(stopped) if name == "train" else ""
        what = STOPPED.get(
            name, "what it was writing may not be whole; the same command begins again"
        )
        print(said or f"stopped; {what}", file=sys.stderr)
        return 128 + int(getattr(stopped, "signum", signal.SIGINT))


if __name__ == "__main__":
    sys.exit(main())
