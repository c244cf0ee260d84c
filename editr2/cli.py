"""The command line. Heavy imports happen inside the commands, so that `--help` and `doctor` answer at once."""

from __future__ import annotations

import errno
import json
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    from jsonargparse import ArgumentParser, Namespace

    from editr2.config import PRESETS, Config, preset_config
    from editr2.errors import ConfigError, UserError
except KeyboardInterrupt:  # torch takes seconds to load
    print("stopped while starting: nothing was done", file=sys.stderr)
    raise SystemExit(130) from None

Arguments = Sequence[str]


def _flag(arguments: Arguments, name: str) -> str | None:
    """The last value of `--name value` or `--name=value`."""
    value = None
    for i, word in enumerate(arguments):
        if word == name:
            if i + 1 == len(arguments):
                raise ConfigError(f"{name}: needs a value")
            value = arguments[i + 1]
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    return value


def _nested(namespace: Namespace) -> dict[str, Any]:
    values: dict[str, Any] = namespace.as_dict()
    return values


def _run_parser(prog: str, description: str) -> ArgumentParser:
    description += " `--data PATH` is short for `--data.path PATH`."
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--preset", type=str, help=f"start from a preset: {', '.join(PRESETS)}")
    parser.add_argument("--config", type=str, help="a YAML file with any of the fields below")
    parser.add_class_arguments(Config, nested_key=None)
    return parser


def run_config(prog: str, description: str, arguments: Arguments, extra: Sequence[tuple[str, dict]] = ()) -> tuple:
    """(Config, the values of `extra` flags) from defaults, `--preset`, `--config` and flags, in this order."""
    from editr2.yaml_config import check_keys, load_yaml, to_dataclass

    # `--data FOLDER` is the short form; jsonargparse would read it as the whole `data` group.
    arguments = [f"--data.path{w[6:]}" if w == "--data" or w.startswith("--data=") else w for w in arguments]
    base = asdict(preset_config(_flag(arguments, "--preset")))
    file = _flag(arguments, "--config")
    if file is not None:
        values, lines = load_yaml(file)
        check_keys(values, lines, Config, file)
        base = _merged(base, values)
    parser = _run_parser(prog, description)
    for name, options in extra:
        parser.add_argument(name, **options)
    parser.set_defaults(_dotted(base))
    try:
        parsed = _nested(parser.parse_args(list(arguments)))
    except Exception as error:
        if type(error).__name__ not in ("ArgumentError", "ParserError"):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
    extras = {name.lstrip("-").replace("-", "_"): None for name, _ in extra}
    extras = {name: parsed.pop(name) for name in extras}
    for name in ("preset", "config"):
        parsed.pop(name, None)
    return to_dataclass(parsed, Config), extras


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in values.items():
        free = key == "weights" and isinstance(value, dict)  # a mapping given is the whole mapping
        result[key] = _merged(base[key], value) if isinstance(value, dict) and not free else value
    return result


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "weights":
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# ------------------------------------------------------------------------------------------------------------ commands


def command_train(arguments: Arguments) -> int:
    """multi-turn RL from start to report; run again to resume"""
    profile = ("--profile", {"action": "store_true", "help": "print the seconds of an iteration by phase at the end"})
    told = "go on although this differs from the run that is resumed: sessions, heldout, weights, reward, or a setting"
    anyway = ("--resume-anyway", {"type": str, "action": "append", "help": f"{told}; again, or with commas, for more"})
    config, extra = run_config("editr2 train", "Train an editor on multi-turn sessions.", arguments, [profile, anyway])
    insisted = [name.strip() for names in extra["resume_anyway"] or () for name in names.split(",") if name.strip()]
    from editr2.trainer import train

    train(config, profile=bool(extra["profile"]), resume_anyway=insisted)
    return 0


def command_check(arguments: Arguments) -> int:
    """find what is wrong with a run before it starts; what it takes in memory and time"""
    extra: list[tuple[str, dict]] = [
        ("--gpu", {"type": str, "default": "h100", "help": "to estimate for: h100, rtx4090, ... or cpu (this one)"}),
        ("--processes", {"type": int, "default": 1, "help": "that torchrun will start, one a GPU"}),
        ("--dry-run", {"action": "store_true", "help": "then train two iterations into a temporary folder"}),
    ]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    description = "Check the settings, data and reward of a run and estimate its memory and time; loads no weights."
    config, given = run_config("editr2 check", description, arguments, extra)
    if given["processes"] < 1:
        raise ConfigError(f"--processes: {given['processes']} (accepted: at least 1)")
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
    config, _ = run_config("editr2 eval", "Score a policy on held-out sessions (see --eval.*, --data.*).", arguments)
    from editr2.data import open_sessions
    from editr2.evaluate import evaluate
    from editr2.policies.load import open_policy
    from editr2.processes import open_processes
    from editr2.rewards.load import load_reward
    from editr2.schedule import eval_sampler, own_schedule

    processes = open_processes()  # first: it says which device is this process's
    policy = open_policy(config.policy, processes, trains=False)
    source = open_sessions(config, policy)
    sampler = eval_sampler(config, own_schedule(policy)).to(processes.device)
    row = evaluate(policy, load_reward(config.reward), source.heldout, sampler, config, processes).row(0, "eval")
    if processes.main:
        print(evaluation_table(row))
    return 0


def evaluation_table(row: dict[str, Any]) -> str:
    """Mean and standard error by turn, as text."""
    names = [key for key in row if key.endswith("_turn")]
    lines = [f"{row['sessions']} sessions", "turn    " + "".join(f"{n.removesuffix('_turn'):>18}" for n in names)]
    for t in range(len(row[names[0]])):
        cells = []
        for name in names:
            mean, se = row[name][t]["mean"], row[name][t]["se"]
            cells.append("-" if mean is None else f"{mean:.3f}" + ("" if se is None else f" +- {se:.3f}"))
        lines.append(f"{t + 1:<8}" + "".join(f"{c:>18}" for c in cells))
    if row["success"]["mean"] is not None:
        lines.append(f"sessions with every turn right: {row['success']['mean']:.1%}")
    for mode, part in row["by_mode"].items():
        if part["success"] is not None:
            lines.append(f"  {mode}: {part['success']:.1%}")
    if row["intents_right"] is not None:
        lines.append(f"intents equal to the known ones: {row['intents_right']:.1%}")
    if row["failed_scores"]:
        lines.append(f"turns without a score: {row['failed_scores']}")
    return "\n".join(lines)


def command_rollout(arguments: Arguments) -> int:
    """edit sessions and write the images, without training"""
    config, _ = run_config(
        "editr2 rollout", "Edit sessions turn by turn and write images and outputs.jsonl into --out.", arguments
    )
    from PIL import Image

    from editr2.data import open_sessions
    from editr2.policies.load import open_policy
    from editr2.processes import open_processes
    from editr2.rollout import Seeds, chunks, rollout_chunk
    from editr2.schedule import eval_sampler, own_schedule

    processes = open_processes()
    policy = open_policy(config.policy, processes, trains=False)
    sessions = open_sessions(config, policy).heldout
    sampler = eval_sampler(config, own_schedule(policy)).to(processes.device)
    out, mine = Path(config.out), processes.share(len(sessions))
    (out / "images").mkdir(parents=True, exist_ok=True)
    parts = [out / "outputs.jsonl", *(out / f"outputs.{i}.jsonl" for i in range(1, processes.count))]
    with parts[processes.index].open("w") as file:
        for chunk in chunks(sessions[mine], range(len(sessions))[mine], 1, 4 * config.rollout.groups_per_batch):
            rollout_chunk(policy, chunk, sampler, Seeds(config.seed, "rollout"), config.policy, greedy=True)
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
    parser = ArgumentParser(prog="editr2 report", description="Write the run's report.html.", exit_on_error=False)
    parser.add_argument("run", type=str, help="a run's folder")
    from editr2.report import build_report

    print(f"report: {build_report(_parsed(parser, arguments).run)}")
    return 0


def command_export(arguments: Arguments) -> int:
    """write a run's policy for other programs, with proof that they load the same"""
    parser = ArgumentParser(prog="editr2 export", description="Write a run's policy for others.", exit_on_error=False)
    parser.add_argument("run", type=str, help="a run's folder; its newest checkpoint is taken")
    parser.add_argument("--out", type=str, required=True, help="folder to write, new or empty")
    parser.add_argument("--weights", type=str, help="ema (averaged; the default where there is one) or live")
    parser.add_argument("--merge", action="store_true", help="add LoRA to the weights it adapts and write them all")
    options = _parsed(parser, arguments)
    from editr2.export import export

    done = export(Path(options.run), Path(options.out), weights=options.weights, merge=options.merge)
    print(done)
    return 0


def command_doctor(arguments: Arguments) -> int:
    """what works on this machine, and why the rest does not"""
    _parsed(ArgumentParser(prog="editr2 doctor", description="What is available.", exit_on_error=False), arguments)
    from editr2.doctor import main as doctor

    return doctor()


def command_data(arguments: Arguments) -> int:
    """sets of sessions: `import` a public one, `validate` one on disk"""
    actions: dict[str, Callable[[Arguments], int]] = {"import": _data_import, "validate": _data_validate}
    return _dispatch("editr2 data", actions, arguments)


def _data_import(arguments: Arguments) -> int:
    """write a public multi-turn set as sessions.jsonl and images (docs/data.md)"""
    from editr2.importers import FORMATS, import_sessions

    parser = ArgumentParser(prog="editr2 data import", description=_data_import.__doc__, exit_on_error=False)
    parser.add_argument("format", type=str, help=", ".join(FORMATS))
    parser.add_argument("source", type=str, help="the set's file or folder, or hf:owner/name:split")
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    parser.add_argument("--images", type=str, help="folder of the images, when they are not where the release has them")
    parser.add_argument("--mode", type=str, help="cm or cu for every session, in place of what the set says")
    parser.add_argument("--limit", type=int, help="only the first so many sessions")
    options = _nested(_parsed(parser, arguments))
    format, source, out = (options.pop(name) for name in ("format", "source", "out"))
    print(f"sessions: {import_sessions(format, source, out, **options)}")
    return 0


def _data_validate(arguments: Arguments) -> int:
    """everything that is wrong with a set of sessions, with its line"""
    parser = ArgumentParser(prog="editr2 data validate", description=_data_validate.__doc__, exit_on_error=False)
    parser.add_argument("path", type=str, help="a sessions.jsonl, a folder that holds one, or hf:owner/name:split")
    path = _parsed(parser, arguments).path
    from editr2.sessions import survey

    found = survey(path)
    print("\n".join(found.problems) if found.problems else found)
    return 2 if found.problems else 0


def command_world(arguments: Arguments) -> int:
    """the embedded world: `make` sessions on disk, `pretrain` the small policy"""
    actions: dict[str, Callable[[Arguments], int]] = {"make": _world_make, "pretrain": _world_pretrain}
    return _dispatch("editr2 world", actions, arguments)


def _world_make(arguments: Arguments) -> int:
    """write sessions of the shapes world as PNG and jsonl"""
    parser = ArgumentParser(prog="editr2 world make", description=_world_make.__doc__, exit_on_error=False)
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=24, help="sessions")
    parser.add_argument("--turns", type=int, default=3, help="turns a session")
    parser.add_argument("--split", type=str, default="train", help="train or heldout")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stream")
    options = _parsed(parser, arguments)
    from editr2.sessions import save_sessions
    from editr2.worlds.shapes import make_session

    sessions = [make_session(options.seed, i, split=options.split, turns=options.turns) for i in range(options.count)]
    print(f"{len(sessions)} sessions: {save_sessions(sessions, options.out)}")
    return 0


def _world_pretrain(arguments: Arguments) -> int:
    """train the embedded policy from random weights on ground-truth sessions"""
    parser = ArgumentParser(prog="editr2 world pretrain", description=_world_pretrain.__doc__, exit_on_error=False)
    from editr2.worlds.pretrain import PretrainConfig, pretrain

    parser.add_argument("--out", type=str, required=True, help="folder for config, tokenizer, weights and log")
    parser.add_class_arguments(PretrainConfig, nested_key=None)
    options = _nested(_parsed(parser, arguments))
    out = Path(options.pop("out"))
    pretrain(PretrainConfig(**options), out)
    print(f"policy: {out}")
    return 0


def command_reproduce(arguments: Arguments) -> int:
    """the papers' comparisons on the world: train every arm, write tables with intervals; run again to resume"""
    from editr2.reproduce.arms import Settings, find_arms

    parser = ArgumentParser(prog="editr2 reproduce", description=command_reproduce.__doc__, exit_on_error=False)
    parser.add_argument("--out", type=str, default="runs/reproduce", help="folder of the runs")
    parser.add_argument("--docs", type=str, default="docs", help="folder of reproduction.md, its plots and its rows")
    parser.add_argument("--arms", type=str, help="comma-separated names; all of them if not given")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of every arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side; they share the cores")
    parser.add_argument("--report-only", action="store_true", help="write the page from the rows there are")
    parser.add_class_arguments(Settings, nested_key=None)
    options = _nested(_parsed(parser, arguments))
    out, docs, report_only = Path(options.pop("out")), Path(options.pop("docs")), options.pop("report_only")
    arms, seeds, jobs = find_arms(options.pop("arms")), options.pop("seeds"), options.pop("jobs")
    for name, value in {"seeds": seeds, "jobs": jobs}.items():
        if value < 1:
            raise ConfigError(f"--{name}: {value} (accepted: at least 1)")
    from editr2.reproduce.page import write_page
    from editr2.reproduce.runs import reproduce

    failures = [] if report_only else reproduce(out, docs, Settings(**options), arms=arms, seeds=seeds, jobs=jobs)
    if failures:
        print(f"failed: {', '.join(failures)}", file=sys.stderr)
    if not failures or (docs / "reproduction.jsonl").exists():
        print(f"page: {write_page(docs)}")
    return 1 if failures else 0


def _parsed(parser: ArgumentParser, arguments: Arguments) -> Namespace:
    try:
        return parser.parse_args(list(arguments))
    except Exception as error:
        if type(error).__name__ not in ("ArgumentError", "ParserError"):
            raise
        raise ConfigError(" ".join(str(error).split())) from error


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
    "train": "nothing was trained by this start; the same command begins again, or goes on from the newest checkpoint",
    "check": "nothing was written; start it again",
    "eval": "nothing was written; start it again",
    "rollout": "what is in --out is not whole; the same command begins again",
    "reproduce": "finished runs stand; the same command trains the rest",
}
"""What is true of a command that Ctrl-C ended. The trainer itself says what it saved (`editr2.run.stop`)."""


def _dispatch(prog: str, commands: dict[str, Callable[[Arguments], int]], arguments: Arguments) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [options]   ({prog} COMMAND --help tells its options)\n")
        for name, command in commands.items():
            print(f"  {name:<10} {command.__doc__}")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        raise ConfigError(f"command: {arguments[0]!r} (accepted: {', '.join(commands)})")
    return commands[arguments[0]](arguments[1:])


def main(arguments: Arguments | None = None) -> int:
    """Entry point: 0 when all went well, 2 with one line on standard error for anything the user can mend."""
    warnings.filterwarnings("default", category=UserWarning, module="editr2")
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch("editr2", COMMANDS, given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'output'}: the disk is full; what was saved before stands", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        name = given[0] if given else ""
        # `check` trains, too, in a folder that is gone now.
        said = str(stopped) if name == "train" else ""
        what = STOPPED.get(name, "what it was writing may not be whole; the same command begins again")
        print(said or f"stopped; {what}", file=sys.stderr)
        return 128 + int(getattr(stopped, "signum", signal.SIGINT))


if __name__ == "__main__":
    sys.exit(main())
