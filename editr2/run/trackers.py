"""W&B, trackio, TensorBoard and others beside `metrics.jsonl`, through accelerate's trackers
(`tracking`, docs/watching.md). None is needed, and `metrics.jsonl` stays the record.

Every number of a row goes to a tracker under its name (`train/reward`, `train/reward_turn/3`,
`eval/success/mean`) at the row's iteration, the settings once, without secrets, and the film-strips
of sessions as images. What was sent before a run was killed is not sent again: an id of the run and
the rows that were sent stand in `tracking.json` of its folder.

A tracker that does not start ends the run with a line, before anything is trained. One that fails
later is a note, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from editr2.config import Config
from editr2.config.fields import is_reference, plain
from editr2.config.plugins import resolve, told
from editr2.config.rules import TRAINS, rule
from editr2.errors import ConfigError, UserError, one_line
from editr2.run.processes import Processes
from editr2.run.tracking import Row, flatten, iteration_of, write_whole
from editr2.secrets import withheld

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

FILE = "tracking.json"
PROJECT = "editr2"
SHOWN = 8
"""Film-strips that a tracker gets of a pass: enough to see by eye, and not the whole of it."""
HEIGHT = 256
"""Pixels of a strip's row of images."""


@dataclass(frozen=True)
class Begun:
    """Where a tracker begins. id: of this run, the same whenever it goes on. resumed: whether it
    went on. at: the iteration that it goes on from."""

    folder: Path
    id: str
    resumed: bool
    at: int


@dataclass(frozen=True)
class Known:
    """A tracker of accelerate's. package: that it needs. install: what pip calls that. options: its
    own, under those of the user. purges: it forgets by itself what comes behind `at`. pictures: in
    place of accelerate's `log_images`, of (tracker, name, image, step)."""

    package: str
    install: str = ""
    options: Callable[[Begun], Mapping[str, Any]] = lambda begun: {}
    purges: bool = False
    pictures: Callable[[Any, str, np.ndarray, int], None] | None = None


def _trackio_picture(tracker: Any, name: str, image: np.ndarray, step: int) -> None:
    import trackio  # type: ignore[import-not-found, unused-ignore]

    tracker.log({name: trackio.Image(image)}, step=step)


def _tensorboard_picture(tracker: Any, name: str, image: np.ndarray, step: int) -> None:
    tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")


TRACKERS: dict[str, Known] = {
    "tensorboard": Known(
        "tensorboard",
        "editr2[tensorboard]",
        lambda begun: {"purge_step": begun.at} if begun.resumed else {},
        purges=True,
        pictures=_tensorboard_picture,
    ),
    "wandb": Known(
        "wandb",
        options=lambda begun: {
            "id": begun.id,
            "name": begun.folder.resolve().name,
            "resume": "allow",
            "dir": str(begun.folder),
        },
    ),
    "trackio": Known(
        "trackio",
        # Its runs are told apart by their names.
        options=lambda begun: {
            "name": f"{begun.folder.resolve().name}-{begun.id}",
            "resume": "allow",
        },
        pictures=_trackio_picture,
    ),
    "aim": Known("aim"),
    "clearml": Known("clearml"),
    "comet_ml": Known("comet_ml", "comet-ml"),
    "dvclive": Known("dvclive"),
    "mlflow": Known("mlflow"),
    "swanlab": Known("swanlab"),
}
"""By the name that accelerate has for it. Of those without options a run that goes on begins
another."""


# ------------------------------------------------------------------------------- what is asked for


def tracking_problem(given: Sequence[str]) -> str | None:
    """What is wrong with the names of `tracking`, or None. Whether they are installed matters where
    they are used."""
    for name in given:
        if name not in TRACKERS and not is_reference(name) and name not in _registered():
            return f"{name!r} is none of them"
    return "each once" if len(set(given)) < len(given) else None


@rule(*TRAINS)
def _trackers(config: Config, command: str) -> Iterator[str]:
    yield from missing_trackers(config.tracking)


def missing_trackers(names: Sequence[str]) -> Iterator[str]:
    """A line for each tracker that cannot be used here."""
    for name in names:
        known = TRACKERS.get(name)
        if known is None:
            try:
                _class_of(name)
            except ConfigError as error:
                yield str(error)
        elif importlib.util.find_spec(known.package) is None:
            yield (
                f"tracking: {name}: needs {known.package}, which is not installed (accepted: pip "
                f"install '{known.install or known.package}')"
            )


def _registered() -> Mapping[str, type[GeneralTracker]]:
    """What accelerate has, with what was registered there in code."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}


def _class_of(name: str) -> type[GeneralTracker]:
    from accelerate.tracking import GeneralTracker

    found = _registered().get(name)
    if found is None:
        found = resolve("tracking", name, what="Class")
    if not (isinstance(found, type) and issubclass(found, GeneralTracker)):
        raise ConfigError(
            f"tracking: {name!r}: (accepted: a class of accelerate.tracking.GeneralTracker)"
        )
    return found


# ------------------------------------------------------------------------------------- what is sent


def open_trackers(
    names: Sequence[str],
    options: Mapping[str, Any],
    folder: Path,
    settings: Any,
    *,
    at: int,
    note: Callable[[str], None],
) -> list[TrackerSink]:
    """Begins them, or goes on with what they have of this run. To be called before the rows of
    `metrics.jsonl` that nothing stands behind are removed.

    folder: of the run. settings: its dataclass, which they get without its secrets. at: the
    iteration that the run stands at. note: takes a line about one that fails later.

    Raises `ConfigError` for one that does not start.
    """
    if not names:
        return []
    file, sent = folder / FILE, _rows_in(folder / "metrics.jsonl")
    held = _read(file)
    resumed = sent > 0 and "id" in held
    begun = Begun(folder, held["id"] if resumed else uuid.uuid4().hex[:8], resumed, at)
    sent = max(sent, held.get("rows", 0)) if resumed else 0
    write_whole(file, json.dumps({"id": begun.id, "rows": sent}) + "\n")
    flat = {name: _scalar(value) for name, value in _leaves(withheld(plain(settings)))}
    sinks: list[TrackerSink] = []
    for name in names:
        try:
            sinks.append(_opened(name, dict(options.get(name, {})), begun, flat, sent, note))
        except Exception as error:
            for sink in sinks:
                sink.close()
            if isinstance(error, UserError):
                raise
            raise ConfigError(
                f"tracking: {name}: does not start: {one_line(error, kind=True)}"
            ) from error
    return sinks


def _opened(
    name: str,
    given: dict[str, Any],
    begun: Begun,
    settings: Mapping[str, Any],
    sent: int,
    note: Callable[[str], None],
) -> TrackerSink:
    known, kind = TRACKERS.get(name, Known("")), _class_of(name)
    project = given.pop("project", PROJECT)
    kept = {**known.options(begun), **given}
    if kind.requires_logging_directory:
        # TensorBoard's folder is <logging_dir>/<its first argument>.
        first = name if name == "tensorboard" else project
        tracker = kind(first, kept.pop("logging_dir", str(begun.folder)), **kept)  # type: ignore[call-arg, arg-type, unused-ignore]
    else:
        tracker = kind(project, **kept)  # type: ignore[arg-type, call-arg, unused-ignore]
    tracker.main_process_only = False  # this is it, and accelerate need not find that out
    tracker.start()
    if not begun.resumed:
        tracker.store_init_configuration(dict(settings))
    skipped = 0 if known.purges else sent
    return TrackerSink(name, tracker, known, skipped, note, fresh=not begun.resumed)


def open_sinks(
    config: Any,
    processes: Processes,
    observer: Callable[[Row], object] | None,
    *,
    at: int,
    note: Callable[[str], None],
) -> list[TrackerSink | Observer]:
    """What looks on at a run, on the first process; errors in opening it are raised on all. config:
    of a run, with `out`, `tracking` and `tracking_options`."""
    opened: list[TrackerSink | Observer] = []

    def work() -> None:
        options, folder = config.tracking_options, Path(config.out)
        opened.extend(open_trackers(config.tracking, options, folder, config, at=at, note=note))
        if observer is not None:
            opened.append(Observer(observer, note))

    processes.on_main(work)
    return opened


class TrackerSink:
    """Takes the rows of a run. skipped: so many of its first rows were sent before. fresh: the
    tracker has nothing of the run yet, also where that goes on."""

    def __init__(
        self,
        name: str,
        tracker: GeneralTracker,
        known: Known,
        skipped: int,
        note: Callable[[str], None],
        *,
        fresh: bool,
    ) -> None:
        self.name, self.tracker, self.known, self._fresh = name, tracker, known, fresh
        self._skipped, self._note, self._noted, self._at = skipped, note, False, 0

    def resumed(self, rows: Sequence[Row], iteration: int) -> None:
        self._skipped = max(0, self._skipped - len(rows))  # those that stand do not come again
        self._at = iteration
        for row in rows:
            # What purges does so from here on, and the evaluation that stays goes as well.
            if self._fresh or (self.known.purges and iteration_of(row) == iteration):
                self.append(row)

    def append(self, row: Mapping[str, Any]) -> None:
        iteration = iteration_of(row)
        self._at = self._at if iteration is None else iteration
        if self._skipped > 0:
            self._skipped -= 1
            return
        values = dict(_named(row))
        if values:
            self._told(lambda: self.tracker.log(values, step=self._at))

    def strips(self, file: Path, iteration: int) -> None:
        """Sessions as images: `strips/<session>`."""
        log = self.known.pictures
        if log is None and hasattr(self.tracker, "log_images"):
            log = _log_images
        if log is None:
            return

        def send() -> None:
            for name, image in strip_images(file):
                log(self.tracker, f"strips/{name}", image, iteration)

        self._told(send)

    def close(self) -> None:
        self._told(self.tracker.finish)

    def _told(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # another program's, over a network: the run's own file has it
            if not self._noted:
                self._note(
                    f"tracking: {self.name}: {one_line(error, kind=True)}; said once, and the run "
                    f"goes on"
                )
            self._noted = True


def _log_images(tracker: Any, name: str, image: np.ndarray, step: int) -> None:
    tracker.log_images({name: [image]}, step=step)


class Observer:
    """A user's function of rows, as a sink. One that raises is told, and asked no more: it looks
    on, and what it looks on goes on."""

    def __init__(self, function: Callable[[Row], object], note: Callable[[str], None]) -> None:
        self._function: Callable[[Row], object] | None = function
        self._note = note

    def append(self, row: Mapping[str, Any]) -> None:
        if self._function is None:
            return
        try:
            self._function(dict(row))
        except Exception as error:
            self._function = None
            self._note(f"observer: {told(error, (__file__,))}; it is not called again")

    def resumed(self, rows: Sequence[Row], iteration: int) -> None:
        for row in rows:
            self.append(row)

    def strips(self, file: Path, iteration: int) -> None:
        pass

    def close(self) -> None:
        pass


def _named(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    event = str(row.get("event", "row"))
    if event == "comparison" and "turn" in row:
        event = f"comparison/turn{row['turn']}"
    for name, value in flatten(row):
        # An evaluation's values by session are many, and no curve.
        if name not in ("iteration", "turn") and "per_session/" not in name:
            yield f"{event}/{name}", value


# ----------------------------------------------------------------------------------------- images


def strip_images(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Of the first sessions of `strips/<pass>.json`, or of `evaluations/<iteration>.jsonl` with its
    picture, the source and the outputs side by side, [H, W, 3] uint8, by the session's id."""
    text = file.read_text("utf-8")
    rows = _pictured(file, text) if file.suffix == ".jsonl" else _drawn(file, text)
    for name, images in itertools.islice(rows, SHOWN):
        if images:
            yield name, np.concatenate([_scaled(image) for image in images], 1)


def _drawn(file: Path, text: str) -> Iterator[tuple[str, list[Image.Image]]]:
    for session in json.loads(text)["sessions"]:
        names = [session["image"], *(turn["image"] for turn in session["turns"])]
        yield str(session["id"]), [_opened_image(file.parent / name) for name in names if name]


def _pictured(file: Path, text: str) -> Iterator[tuple[str, list[Image.Image]]]:
    found = [path for end in (".png", ".jpg") if (path := file.with_suffix(end)).exists()]
    if not found:
        return
    sheet = _opened_image(found[0])
    for session in map(json.loads, text.splitlines()):
        if (place := session.get("sheet")) is not None:
            (width, height), top = place["cell"], place["top"]
            cells = range(1 + place["outputs"])
            boxes = [(k * width, top, (k + 1) * width, top + height) for k in cells]
            yield str(session["id"]), [sheet.crop(box) for box in boxes]


def _opened_image(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _scaled(image: Image.Image) -> np.ndarray:
    factor = HEIGHT / image.height
    # Small images keep their pixels, large ones are averaged.
    how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    size = (max(1, round(image.width * factor)), HEIGHT)
    return np.asarray(image.resize(size, how))


# ------------------------------------------------------------------------------------ what is known


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("id"), str)
    return found if whole and isinstance(found.get("rows", 0), int) else {}


def _rows_in(file: Path) -> int:
    """Whole rows: a torn one was not sent."""
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
