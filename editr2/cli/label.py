"""`editr2 label`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from editr2.cli.flags import SOME, Arguments, Flags, dispatch
from editr2.config.fields import Bounds
from editr2.errors import ConfigError, DataError, counted

if TYPE_CHECKING:
    from editr2.label.store import Store

OUTPUTS = "outputs"
"""The format that is none of others'."""


def command(arguments: Arguments) -> int:
    """ask people which output is better, on a local page"""
    actions: dict[str, Callable[[Arguments], int]] = {
        "import": _import,
        "serve": _serve,
        "report": _report,
        "export": _export,
    }
    # A folder alone is served; one of an action's name is `./report`.
    words = (*actions, "help")
    if arguments and arguments[0] not in words and not arguments[0].startswith("-"):
        return _serve(arguments)
    return dispatch("editr2 label", actions, arguments)


def _serve(arguments: Arguments) -> int:
    """show a folder's pairs, blind, and keep what people say"""
    flags = Flags(
        "editr2 label serve",
        _serve.__doc__ or "",
        [
            ("my_pairs", "the same as `editr2 label my_pairs`"),
            ("my_pairs --port 9000 --people 2", "two answers a question, on another port"),
        ],
    )
    _add_folder(flags)
    flags.add(
        "--port",
        type=int,
        default=8420,
        bounds=Bounds(at_least=0, at_most=65_535),
        help="of 127.0.0.1; 0 is any free one",
    )
    flags.add(
        "--people",
        type=int | None,
        bounds=Bounds(at_least=1, at_most=1000),
        help="a question is done when so many answered; none: everybody answers all",
    )
    flags.add(
        "--principles",
        action="store_true",
        help="also ask which output each principle holds for",
    )
    options = flags.parse(arguments)
    from dataclasses import replace

    from editr2.label.questions import READERS, read_questions
    from editr2.label.serve import Page, address, serve
    from editr2.label.store import NAME
    from editr2.serving import listen

    folder = Path(options["folder"])
    waits = (folder / NAME).is_file()  # a run asks here: there need be no file
    given = waits and not any((folder / name).is_file() for name in READERS)
    questions = [] if given else read_questions(folder)
    page_of = _store(folder)
    page_of.ask(replace(one, needed=options["people"]) for one in questions)
    page = Page(page_of, principles=options["principles"], title=folder.resolve().name)
    page.app()  # without the extra there is nothing to open
    listening = listen(options["port"])
    count = counted(len(page_of.questions()), "question")
    print(f"{count}: {address(page_of, listening)}", flush=True)
    print("Ctrl-C ends it; every vote is kept", flush=True)
    try:
        serve(page, listening)
    finally:
        page_of.close()
    return 0


def _import(arguments: Arguments) -> int:
    """write questions.jsonl of pairs, preferences or outputs"""
    from editr2.benchmarks.table import PAIR_SETS

    flags = Flags(
        "editr2 label import",
        _import.__doc__ or "",
        [
            (
                "outputs examples/shapes --outputs runs/a --outputs runs/b --out to_label",
                "of each turn, its siblings",
            ),
            (
                "preferences their/preferences.json --out to_label",
                "the form of HPDv3 and EditReward-Data",
            ),
        ],
    )
    flags.add(
        "format",
        among=lambda: [OUTPUTS, *PAIR_SETS],
        help="the set's; outputs: what `editr2 rollout` wrote, siblings of each turn",
    )
    flags.add("source", path=True, help="the set's file or folder; of outputs, the sessions")
    flags.out("to label")
    flags.add("--outputs", path=True, action="append", help="a folder of outputs; again for more")
    flags.add("--sources", path=True, help="folder of the images, where the release has them not")
    flags.add("--limit", type=int, bounds=SOME, help="only the first so many")
    options = flags.parse(arguments)
    out, source, limit = Path(options["out"]), options["source"], options["limit"]
    if (options["format"] == OUTPUTS) != bool(options["outputs"]):
        raise ConfigError(f"--outputs: accepted with the format {OUTPUTS}, which needs them")
    out.mkdir(parents=True, exist_ok=True)
    if options["format"] == OUTPUTS:
        from editr2.judge.asking import write_asked
        from editr2.sessions import load_sessions

        sessions = load_sessions(source, limit=limit, memory=0)
        print(f"questions: {write_asked(options['outputs'], {s.id: s for s in sessions}, out)}")
        return 0
    from editr2.benchmarks.pairs.asking import write_asked as write_labelled
    from editr2.benchmarks.table import Source
    from editr2.config.plugins import resolve

    entry = resolve("format", options["format"], PAIR_SETS, what="NAME")
    images = None if options["sources"] is None else Path(options["sources"])
    labelled = entry.read(Source(Path(source), images)).first(limit)
    print(f"questions: {write_labelled(labelled, out)}")
    for why, count in labelled.left_out.most_common():
        print(f"  left out: {count} x {why}")
    return 0


def _report(arguments: Arguments) -> int:
    """how many votes, how people agree, who favours a side"""
    flags = Flags(
        "editr2 label report",
        _report.__doc__ or "",
        [
            ("my_pairs", "a folder that was labelled"),
        ],
    )
    _add_folder(flags)
    store = _opened(Path(flags.parse(arguments)["folder"]))
    from editr2.label.summary import lines

    print("\n".join(lines([one.question for one in store.questions()], store.votes())))
    return 0


def _export(arguments: Arguments) -> int:
    """write pairs.jsonl: what most prefer, for a verifier to learn"""
    flags = Flags(
        "editr2 label export",
        _export.__doc__ or "",
        [
            ("my_pairs --out pairs.jsonl", "what most prefer"),
            (
                "my_pairs --out pairs.jsonl --least 0.5 --votes votes.jsonl",
                "clear ones alone; and every vote",
            ),
        ],
    )
    _add_folder(flags)
    flags.add("--out", path=True, required=True, help="the file to write, pairs.jsonl")
    flags.add("--votes", path=True, help="also write every vote, to votes.jsonl")
    flags.add(
        "--least",
        type=float,
        default=0.0,
        bounds=Bounds(at_least=0, at_most=1),
        help="leave out pairs with a smaller margin: votes for less against, of all",
    )
    options = flags.parse(arguments)
    from editr2.label.export import preferences, write_preferences, write_votes

    store, file = _opened(Path(options["folder"])), Path(options["out"])
    votes = store.votes()
    exported = preferences(
        [one.question for one in store.questions()], votes, file, least=options["least"]
    )
    if not exported.rows:
        said = ", ".join(f"{n} {why}" for why, n in exported.left_out.items()) or "no votes"
        raise DataError(f"{options['folder']}: no pair to write: {said}")
    write_preferences(file, exported)
    print(f"{counted(len(exported.rows), 'pair')}: {file}")
    for why, count in exported.left_out.most_common():
        print(f"  left out: {count} x {why}")
    if options["votes"] is not None:
        write_votes(Path(options["votes"]), votes)
        print(f"{len(votes)} votes: {options['votes']}")
    return 0


def _add_folder(flags: Flags) -> None:
    flags.add("folder", path=True, help="with questions.jsonl, pairs.jsonl or edits.jsonl")


def _opened(folder: Path) -> Store:
    from editr2.label.store import NAME

    if not (folder / NAME).is_file():
        raise DataError(f"{folder / NAME}: no such file (accepted: a folder that was labelled)")
    return _store(folder)


def _store(folder: Path) -> Store:
    from editr2.label.store import Store

    return Store(folder)
