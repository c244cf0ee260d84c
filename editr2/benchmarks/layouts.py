"""Where the images of a benchmark lie: a table of the layouts that are found, and the one that is
written.

What `generate` writes is EdiVal-Bench's own layout, so that its stock evaluator reads it: in a
folder for each pass the source, `ID_input_raw.png`, and after every turn
`ID_input_raw_turn_1.png`, `…_2.png`. (That evaluator takes ids that are whole numbers, which
EdiVal's are, and of these such as have all of their turns.)

Images that were made elsewhere are found in any layout of `LAYOUTS`. They are judged at the size of
their session's image. One of another size is an error that names the file, or is brought to it with
`data.resize` (crop, stretch), as images of sessions are.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from editr2.errors import DataError, shown
from editr2.judge.outputs import FILE_NAME, image_of, records, some
from editr2.sessions import Session
from editr2.sessions.buckets import Size
from editr2.sessions.images import ImageFile, Pixels, inside, read_image, size_in_file
from editr2.sessions.session import kind

FOLDER = "generations"
LONGEST_NAME = 100

Turns = Sequence[Path | None]
"""Of a session: the image of every turn that has one."""


def generations(folder: Path, sample: int = 1) -> Path:
    """The folder of a benchmark's own images; sample: which of several, from 1."""
    return folder / (FOLDER if sample == 1 else f"{FOLDER}-{sample}")


def file_names(sessions: Sequence[Session]) -> dict[str, str]:
    """What files call each session: its id where every system takes that for a name of its own, and
    else what is left of the id with a hash of it."""
    alike = Counter(session.id.lower() for session in sessions)
    # An id may be what another's hash makes of that.
    alike.update(_hashed(session.id).lower() for session in sessions)
    return {
        one.id: one.id if _is_safe(one.id) and alike[one.id.lower()] == 1 else _hashed(one.id)
        for one in sessions
    }


def _is_safe(name: str) -> bool:
    return re.fullmatch(rf"[A-Za-z0-9._-]{{1,{LONGEST_NAME}}}", name) is not None


def _hashed(name: str) -> str:
    left = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:40].strip("-") or "session"
    content = name.encode("utf-8", errors="backslashreplace")
    return f"{left}-{hashlib.sha256(content).hexdigest()[:12]}"


def source_file(name: str) -> str:
    return f"{name}_input_raw.png"


def turn_file(name: str, turn: int) -> str:
    """turn: from 0."""
    return f"{name}_input_raw_turn_{turn + 1}.png"


class Layout(NamedTuple):
    """files: the image of turn T of session ID, for messages. ways: the passes that it can hold.
    find: of a folder, the sessions' images of a pass, for those that have any."""

    files: str
    ways: Sequence[str]
    find: Callable[[Path, Sequence[Session], str], Mapping[str, Turns]]


def _edival(folder: Path, sessions: Sequence[Session], way: str) -> dict[str, Turns]:
    """A folder as EdiVal's generate.py writes it, or that of a benchmark of ours."""
    root = next((r for r in (folder / way, folder / FOLDER / way) if r.is_dir()), None)
    if root is None:
        return {}
    there, names, found = set(os.listdir(root)), file_names(sessions), dict[str, Turns]()
    for session in sessions:
        files = [turn_file(names[session.id], t) for t in range(len(session.turns))]
        found[session.id] = [root / file if file in there else None for file in files]
    return found


def _outputs(folder: Path, sessions: Sequence[Session], way: str) -> dict[str, Turns]:
    """As `editr2 rollout` writes them; lines of other sessions are left out."""
    file, known, found = folder / FILE_NAME, {one.id: one for one in sessions}, dict[str, Turns]()
    for where, record in records(file) if file.is_file() else ():
        name, turns = record.get("id"), record.get("turns")
        if not isinstance(name, str) or name not in known:
            continue
        session = known[name]
        if name in found:
            raise DataError(f"{where}: id: {shown(repr(name))} again (accepted: one line each)")
        if not isinstance(turns, list) or len(turns) > len(session.turns):
            raise DataError(
                f"{where}: turns: {kind(turns)} (accepted: a list of up to {len(session.turns)}, "
                f"an object for each turn of session {shown(repr(name))})"
            )
        paths = [
            image_of(where, folder, session, t, turn)
            if isinstance(turn, Mapping) and turn.get("image") is not None
            else None
            for t, turn in enumerate(turns)
        ]
        found[name] = [path if path is not None and path.is_file() else None for path in paths]
    return found


def _gedit(folder: Path, sessions: Sequence[Session], way: str) -> dict[str, Turns]:
    """As GEdit-Bench's test_gedit_score.py reads the images of a model; the folder is the model's,
    or that which holds it alone."""
    if (folder / "fullset").is_dir():
        models = [folder]
    else:
        models = sorted(path.parent for path in folder.glob("*/fullset") if path.is_dir())
    if len(models) > 1:
        listed = ", ".join(shown(model) for model in models[:8])
        raise DataError(f"{shown(folder)}: {len(models)} models (accepted: one of {listed})")

    def places(session: Session) -> Iterator[str]:
        task = _told(session, "task_type") or session.turns[0].task
        said = _told(session, "instruction_language")
        for language in (said,) if said else ("en", "cn"):
            yield f"fullset/{task}/{language}/{_key(session)}.png"

    return _first_turns(models[0], sessions, places) if models else {}


def _imgedit(folder: Path, sessions: Sequence[Session], way: str) -> dict[str, Turns]:
    """As ImgEdit's basic_bench.py reads them."""
    return _first_turns(folder, sessions, lambda session: [f"{_key(session)}.png"])


def _first_turns(
    folder: Path,
    sessions: Sequence[Session],
    places: Callable[[Session], Iterator[str] | list[str]],
) -> dict[str, Turns]:
    """Of sets of single edits: the first place with an image, never outside of the folder."""
    found = dict[str, Turns]()
    for session in sessions:
        paths = [path for name in places(session) if (path := inside(folder, name)) is not None]
        image = next((path for path in paths if path.is_file()), None)
        if image is not None:
            found[session.id] = [image]
    return found


def _key(session: Session) -> str:
    return _told(session, "key") or session.id


def _told(session: Session, name: str) -> str | None:
    """What the set says of a session, or else of its first turn, where that is text."""
    value = session.meta.get(name, session.turns[0].meta.get(name))
    return value if isinstance(value, str) and value else None


LAYOUTS: dict[str, Layout] = {
    "edival": Layout("PASS/ID_input_raw_turn_T.png", ("multipass", "singlepass", "exact"), _edival),
    "outputs": Layout(f"{FILE_NAME} of `editr2 rollout`", ("multipass",), _outputs),
    "gedit": Layout("MODEL/fullset/TASK/LANGUAGE/ID.png", ("multipass", "singlepass"), _gedit),
    "imgedit": Layout("ID.png", ("multipass", "singlepass"), _imgedit),
}
"""Of generated images. Sets of single edits make no difference between multi- and single-pass."""


class NoImages(DataError):
    """There is no image of a pass."""


@dataclass(frozen=True)
class Images:
    """The images of a pass that were found.

    layout: which of `LAYOUTS` they are in. found: by session id, a file for every turn, or None
    where it is missing. resize: what becomes of an image of another size than the session's.
    """

    way: str
    layout: str
    folder: Path
    found: Mapping[str, tuple[Path | None, ...]]
    resize: str = "no"

    def of(self, session: Session) -> list[Path | None]:
        """By turn; None where there is no image."""
        return list(self.found[session.id])

    def read(self, session: Session, turn: int) -> Pixels:
        """uint8 [H, W, 3], of the size of the session's image. turn: from 0, one that has an image.
        Raises DataError naming the file."""
        path = self.found[session.id][turn]
        if path is None:
            raise DataError(f"session {shown(repr(session.id))}, turn {turn + 1}: no image")
        return read_image(path, session.image_size, self.resize)

    @property
    def missing(self) -> list[tuple[str, int]]:
        """(session id, turn from 0) of all that should be there and are not."""
        return [
            (name, t)
            for name, turns in self.found.items()
            for t, path in enumerate(turns)
            if not path
        ]

    def line(self) -> str:
        """What was found, for a terminal."""
        every, missing = sum(map(len, self.found.values())), self.missing
        files = LAYOUTS[self.layout].files.replace("PASS", self.way)
        told = f"{self.way}: {every - len(missing)} of {every} images in {self.folder} ({files})"
        if missing:
            told += f"; missing: {some(f'{name}, turn {t + 1}' for name, t in missing)}"
        return told


def find_images(
    folder: Path,
    sessions: Sequence[Session],
    way: str,
    layouts: Sequence[str],
    resize: str = "no",
) -> Images:
    """The sessions' images of a pass, in the first of `layouts` (names of `LAYOUTS`) in which there
    is any. What is missing is None. resize: as `data.resize`.

    Raises NoImages for a folder without an image of any session, and DataError for an image that
    cannot be read (by its header, here) or, unless it is resized, has another size than its
    session's; it names the file.
    """
    if not folder.is_dir():
        raise DataError(f"{shown(folder)}: no such folder (accepted: one of generated images)")
    held = [name for name in layouts if way in LAYOUTS[name].ways]
    for name in held:
        some_found = LAYOUTS[name].find(folder, sessions, way)
        found = {one.id: _padded(some_found.get(one.id, ()), len(one.turns)) for one in sessions}
        if any(path for turns in found.values() for path in turns):
            for session in sessions:
                _check(found[session.id], session, resize)
            return Images(way, name, folder, found, resize)
    looked_for = "; ".join(LAYOUTS[name].files.replace("PASS", way) for name in held)
    raise NoImages(
        f"{shown(folder)}: {way}: no image of any of {len(sessions)} sessions (accepted: "
        f"{looked_for or 'nothing; such images can be of ' + ', '.join(_ways(layouts))}; an ID is "
        f"{some(file_names(sessions).values())})"
    )


def _ways(layouts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(way for name in layouts for way in LAYOUTS[name].ways))


def _padded(turns: Turns, count: int) -> tuple[Path | None, ...]:
    return (*turns, *(None for _ in range(count - len(turns))))


def _check(turns: Turns, session: Session, resize: str) -> None:
    """Reads no pixels: what is wrong in a set of thousands is said before any of it is judged."""
    for path in filter(None, turns):
        height, width = size_in_file(path)
        if resize == "no" and (height, width) != (wanted := _size_of(session)):
            raise DataError(
                f"{shown(path)}: {height}x{width} (height x width), and the image of session "
                f"{shown(repr(session.id))} is {wanted[0]}x{wanted[1]} (accepted: equal sizes; "
                f"--data.resize crop or stretch brings others to it)"
            )


def _size_of(session: Session) -> Size:
    """`Session.image_size`, by the header where the image would be decoded for it."""
    image = vars(session)["image"]
    if isinstance(image, ImageFile) and image.size is None:
        return size_in_file(image.path)
    return session.image_size
