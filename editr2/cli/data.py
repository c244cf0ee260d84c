"""`editr2 data`"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editr2.cli.flags import SOME, Arguments, Flags, dispatch
from editr2.cli.loading import load_libraries
from editr2.config.fields import Bounds
from editr2.config.settings import CALLS_AT_ONCE, TIMEOUT, TRIES
from editr2.errors import ConfigError, DataError

if TYPE_CHECKING:
    from editr2.annotate.asking import Options
    from editr2.sessions import Session


def command(arguments: Arguments) -> int:
    """sets of sessions: import, validate, annotate, make"""
    actions: dict[str, Callable[[Arguments], int]] = {
        "import": _data_import,
        "validate": _data_validate,
        "annotate": _data_annotate,
        "make": _data_make,
    }
    return dispatch("editr2 data", actions, arguments)


def _data_import(arguments: Arguments) -> int:
    """write a public set as sessions.jsonl and images"""
    from editr2.sessions.importers import FORMATS, import_sessions

    flags = Flags(
        "editr2 data import",
        _data_import.__doc__ or "",
        [
            ("magicbrush dev --out data/magic", "a release's folder"),
            ("mice Edit-R2/dataset/cm/train_metadata.jsonl --out data/mice", "or its file"),
            (
                "sessions hf:owner/name:split --out data/mine",
                "a dataset of the hub with our columns",
            ),
        ],
    )
    flags.add("format", among=lambda: FORMATS, help="the set's")
    flags.add("source", path=True, help="the set's file or folder, or hf:owner/name:split")
    flags.out()
    flags.add(
        "--images",
        path=True,
        help="folder of the images, when they are not where the release has them",
    )
    flags.add(
        "--mode", type=Literal["cm", "cu"], help="of every session, in place of what the set says"
    )
    flags.add("--limit", type=int, bounds=SOME, help="only the first so many sessions")
    options = flags.parse(arguments)
    format, source, out = (options.pop(name) for name in ("format", "source", "out"))
    print(f"sessions: {import_sessions(format, source, out, **options)}")
    return 0


def _data_validate(arguments: Arguments) -> int:
    """everything that is wrong with a set of sessions, with its line"""
    flags = Flags(
        "editr2 data validate",
        _data_validate.__doc__ or "",
        [
            ("my_set", "a folder with sessions.jsonl, and its images"),
        ],
    )
    flags.add(
        "path", path=True, help="a sessions.jsonl, a folder that holds one, or hf:owner/name:split"
    )
    path = flags.parse(arguments)["path"]
    from editr2.annotate.fields import Tally
    from editr2.sessions import survey

    tally = Tally()
    found = survey(path, each=tally.add)
    if found.problems:
        print("\n".join(found.problems))
        return 2
    print(f"{found}\n{tally}")
    return 0


def _data_annotate(arguments: Arguments) -> int:
    """add what rewards judge by: task, form, objects of a turn"""
    flags = Flags(
        "editr2 data annotate",
        _data_annotate.__doc__ or "",
        [
            ("my_set --out annotated --url http://127.0.0.1:8000/v1 --page", "by a served judge"),
            (
                "annotated --out corrected --corrections corrections.jsonl",
                "what you corrected on the page",
            ),
        ],
    )
    flags.add("source", path=True, help="the sessions: anything that --data takes")
    _add_out(flags)
    _add_judge(flags)
    flags.add("--limit", type=int, bounds=SOME, help="only the first so many sessions")
    flags.add("--page", action="store_true", help="also write annotations.html, to correct them")
    flags.add("--corrections", path=True, help="a corrections.jsonl of that page; needs no judge")
    options = flags.parse(arguments)
    load_libraries()
    from editr2.annotate.annotate import Report, annotate
    from editr2.annotate.asking import Judge, Looker
    from editr2.annotate.corrections import corrected
    from editr2.annotate.page import write_page
    from editr2.annotate.problems import by_kind
    from editr2.rewards.record import Record
    from editr2.sessions import save_sessions

    out = Path(options["out"])
    given = _judge_options(options)
    asks = given.url is not None or given.url_env is not None
    if not asks and options["corrections"] is None:
        raise ConfigError("--url: none (accepted: a judge's address, http://host:port/v1)")
    sessions = _sessions(options["source"], out, options["limit"])
    if options["corrections"] is not None:
        sessions = corrected(sessions, options["corrections"])
    record = Record(out)
    judge = Judge(given, record) if asks else None
    looker = Looker(given, record) if asks else None
    report: Report = annotate(
        sessions,
        judge,
        looker,
        concurrency=given.calls.concurrency or 16,
        progress=_progress("annotated"),
    )
    path = save_sessions(report.sessions, out)
    print(f"sessions: {path}")
    if options["page"]:
        print(f"page: {write_page(report.sessions, out)}")
    print(f"{report.whole} of {len(report.sessions)} sessions have every field")
    for line in by_kind(report.problems):
        print(f"  {line}")
    if report.not_found:
        name, turn, what = report.not_found[0]
        first = f"{name}{f', turn {turn}' if turn else ''}: {what}"
        print(f"  {len(report.not_found)} x not found by the detector (first: {first})")
    return 0


def _data_make(arguments: Arguments) -> int:
    """make sessions, and what rewards judge by, of images"""
    flags = Flags(
        "editr2 data make",
        _data_make.__doc__ or "",
        [
            ("photos --out made --count 200 --url http://127.0.0.1:8000/v1", "by a served judge"),
        ],
    )
    flags.add("images", path=True, help="a folder of images")
    _add_out(flags)
    flags.add("--count", type=int, required=True, bounds=SOME, help="sessions to make")
    flags.add(
        "--turns", type=int, default=3, bounds=Bounds(at_least=2, at_most=6), help="of a session"
    )
    flags.add(
        "--mode",
        type=Literal["cm", "cu", "mixed"],
        default="mixed",
        help="cm: a standing rule, cu: pronouns, mixed: some of each",
    )
    flags.add("--seed", type=int, default=0, bounds=Bounds(at_least=0), help="of what is drawn")
    _add_judge(flags)
    options = flags.parse(arguments)
    load_libraries()
    from editr2.annotate.asking import Judge, Looker
    from editr2.annotate.make import images_of, make
    from editr2.rewards.record import Record
    from editr2.sessions import save_sessions

    given = _judge_options(options)
    if given.url is None and given.url_env is None:
        raise ConfigError("--url: none (accepted: a judge's address, http://host:port/v1)")
    if given.detector is None:
        raise ConfigError("--detector: none (accepted: one; what nobody finds is no thing to edit)")
    pictures = images_of(options["images"])
    record = Record(options["out"])
    made = make(
        pictures,
        Judge(given, record),
        Looker(given, record),
        count=options["count"],
        mode=options["mode"],
        turns=options["turns"],
        seed=options["seed"],
        concurrency=given.calls.concurrency or 16,
        progress=_progress("made"),
    )
    dropped = [
        f"{count} x {why} (first: {made.first[why]})" for why, count in made.dropped.most_common()
    ]
    if not made.sessions:
        raise DataError(
            f"{options['images']}: none of {made.candidates} candidates became a session: "
            f"{'; '.join(dropped)}"
        )
    print(f"sessions: {save_sessions(made.sessions, options['out'])}")
    print(f"{len(made.sessions)} of {options['count']} sessions, of {made.candidates} candidates")
    for line in dropped:
        print(f"  {line}")
    return 0


def _add_out(flags: Flags) -> None:
    flags.out(
        "folder to write, with the judge's answers in judges.jsonl: a second start asks "
        "nothing again"
    )


def _add_judge(flags: Flags) -> None:
    flags.add("--url", help="the judge, an OpenAI-compatible server: http://host:port/v1")
    flags.add("--url-env", help="the name of an environment variable that holds the address")
    flags.add("--model", help="the judge's name at the server; none is the only one it has")
    flags.add("--key-env", help="the name of an environment variable that holds the key")
    flags.add("--image-form", type=Literal["png", "jpeg"], default="png", help="as images are sent")
    flags.add(
        "--max-side",
        type=int | None,
        bounds=Bounds(at_least=16, at_most=16_384),
        help="larger images are sent scaled down to so many pixels",
    )
    flags.add("--concurrency", type=int, default=16, bounds=CALLS_AT_ONCE, help="requests at once")
    flags.add("--timeout", type=float, default=120.0, bounds=TIMEOUT, help="seconds a try")
    flags.add("--retries", type=int, default=4, bounds=TRIES, help="further tries")
    flags.add(
        "--detector",
        default="IDEA-Research/grounding-dino-tiny",
        help="Grounding DINO or OWLv2, a folder or an id of the hub; an address; "
        "package.module:name; none",
    )
    flags.add(
        "--detector-kind",
        type=Literal["grounding-dino", "owlv2"],
        default="grounding-dino",
        help="of a folder or an id",
    )
    flags.add("--device", default="cpu", help="where the detector is: cpu, cuda:1 or the like")
    flags.add(
        "--threshold",
        type=float,
        default=0.35,
        bounds=Bounds(at_least=0, at_most=1),
        help="a thing is there where the detector is surer of it",
    )
    flags.add("--prompts", path=True, help="a folder of prompts in place of ours (docs/data.md)")


def _judge_options(options: dict[str, Any]) -> Options:
    from editr2.annotate.asking import Options
    from editr2.rewards.base import Calls

    names = ("url", "url_env", "model", "key_env", "max_side", "detector_kind", "device")
    detector = options["detector"]
    return Options(
        **{name: options[name] for name in (*names, "threshold", "prompts")},
        images=options["image_form"],
        detector=None if detector == "none" else detector,
        calls=Calls(options["concurrency"], options["timeout"], options["retries"]),
    )


def _sessions(source: str, out: Path, limit: int | None) -> list[Session]:
    """Of a set, their images left in their files."""
    from editr2.sessions import load_sessions

    file = Path(source)
    if file.exists() and (file if file.is_dir() else file.parent).resolve() == out.resolve():
        raise ConfigError(f"--out: {out} is the source (accepted: another folder)")
    return load_sessions(source, limit=limit, memory=0)


def _progress(what: str) -> Callable[[int, int], None]:
    """On a terminal, how far it is."""

    def show(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what} {done} of {of}", end="\n" if done == of else "", file=sys.stderr)

    return show
