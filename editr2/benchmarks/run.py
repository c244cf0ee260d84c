"""A benchmark from start to end: generate, judge, report, each going on where it was stopped.

What numbers depend on stands in `benchmark.json`: of the images the settings and fingerprints of
sessions and weights (or of the folder that they were found in), of the scores those of the reward.
Another start with others of these is refused where images would be mixed; scores are asked for
again.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from editr2.benchmarks import page, paper, strips, summary, text
from editr2.benchmarks.best_of import best_of_rows
from editr2.benchmarks.generate import generate
from editr2.benchmarks.judging import judge
from editr2.benchmarks.layouts import (
    Images,
    NoImages,
    file_names,
    find_images,
    generations,
    source_file,
    turn_file,
)
from editr2.benchmarks.rows import FILE_NAME, read_rows
from editr2.benchmarks.saved import seen_in
from editr2.benchmarks.settings import (
    BenchmarkConfig,
    benchmark_problems,
    check_folder,
    named,
    with_defaults,
)
from editr2.benchmarks.sized import sized
from editr2.benchmarks.summary import IDENTITY
from editr2.benchmarks.table import Benchmark, Source, find
from editr2.errors import ConfigError, DataError, shown
from editr2.files import read_object, write_lines
from editr2.judge import best_of
from editr2.judge.text import laid_out
from editr2.judge.trial import CountingRecord
from editr2.policies.load import open_policy
from editr2.policies.rules import check_config
from editr2.rewards.load import load_reward
from editr2.rewards.panel import Panel
from editr2.rl.rules import check_run
from editr2.rl.sampler import eval_sampler, own_schedule
from editr2.rl.sessions import demands
from editr2.run import identity
from editr2.run.lock import RunLock
from editr2.run.processes import Processes, open_processes
from editr2.sessions import Session

AGAINST_FILE = "scores-against.jsonl"
SECTIONS = ("policy.", "rollout.", "eval.")
"""Of settings, that images depend on, beside `seed` and `data.resize`."""
UNSEEN = (
    *(f"rollout.{name}" for name in ("sessions", "siblings", "turns", "ahead", "prune")),
    *(f"eval.{name}" for name in ("sessions", "turns", "every", "strips", "strips_from", "reward")),
    "eval.drift.",
)
"""Of these sections, what no image of a benchmark depends on: training's and its evaluations'."""


def run_benchmark(
    config: BenchmarkConfig, name: str, editor: str | None = None, notes: Sequence[str] = ()
) -> list[str]:
    """Does the stages and returns what to print. editor: what the user called it; notes: about it.
    Raises `UserError` for whatever is wrong with what was given, before anything is made."""
    name, config = named(config, name)
    kind = find(name)
    asked = bool(config.passes)
    config = with_defaults(config, kind)
    for problem in benchmark_problems(config, kind):
        raise ConfigError(problem)
    out, processes = Path(config.out), open_processes()
    check_folder(out, IDENTITY)
    with RunLock(out) as lock:
        processes.on_main(lambda: lock.take(make=False))
        run = Run(config, name, kind, processes, lock, editor, asked)
        for note in notes:
            run.say(f"note: {note}")
        return run.stages()


class Run:
    """One benchmark of one editor in its folder. All processes do the same calls."""

    def __init__(
        self,
        config: BenchmarkConfig,
        name: str,
        kind: Benchmark,
        processes: Processes,
        lock: RunLock,
        editor: str | None,
        asked: bool = False,
    ) -> None:
        """asked: for the passes by name; else one without images is left out."""
        self.name, self.kind, self.processes, self._lock = name, kind, processes, lock
        self.config = config
        if not config.images:
            self.config = cast(BenchmarkConfig, check_config(config, "eval"))
        self.asked, self.out = asked, Path(config.out)
        self.about: dict[str, Any] = {}
        if (file := self.out / IDENTITY).exists():
            self.about = _checked(file, read_object(file, "another --out"))
        self.editor = editor or config.images or config.policy.weights or config.policy.model
        self.record = CountingRecord(self.out, index=processes.index, cache=config.reward.cache)

    def stages(self) -> list[str]:
        c = self.config
        try:
            asks = c.does("judge")  # before weights are read: a wrong reward is told at once
            panel = load_reward(c.reward, self.record) if asks else None
            other = load_reward(c.against, self.record) if asks and c.against.given else None
            next(iter(self.kind.read(self._source())), None)  # a set that is not there, likewise
            for one, file in ((panel, FILE_NAME), (other, AGAINST_FILE)):
                # Where it has judged nothing may be left to ask, and its models need not be here.
                if one is not None and not (self.out / file).is_file():
                    one.quick_look()
            sessions, images = self._found() if c.images else self._made()
            if panel is not None:
                self._judged(panel, "judged", FILE_NAME, sessions, images)
            if other is not None:
                self._judged(other, "against", AGAINST_FILE, sessions, images)
        finally:
            self.record.close()
        self.processes.wait()
        if not c.does("report") or not self.processes.main:
            return []
        return self._report(sessions, images)

    def say(self, line: str) -> None:
        """On standard error, by the first of several processes."""
        if self.processes.main:
            print(line, file=sys.stderr, flush=True)

    # ---------------------------------------------------------------------------------- generate

    def _source(self) -> Source:
        c = self.config
        return Source(
            None if c.data.path is None else Path(c.data.path),
            None if c.sources is None else Path(c.sources),
            c.turns,
            c.sessions or 100,
        )

    def _sessions(self, **how: Any) -> list[Session]:
        c, source = self.config, self._source()
        sessions = self.kind.read(source)
        limit = None if self.kind.makes_sessions else c.sessions
        found = sized(itertools.islice(sessions, limit), resize=c.data.resize, **how)
        if not found:
            raise DataError(f"--data: {shown(source.path)}: no session (accepted: one or more)")
        return found

    def _found(self) -> tuple[list[Session], dict[str, list[Images]]]:
        """Images that were made elsewhere."""
        folder = Path(str(self.config.images))
        sessions = self._sessions(size=None)
        found, absent = dict[str, list[Images]](), list[DataError]()
        for way in self.config.passes:
            try:
                images = find_images(
                    folder, sessions, way, self.kind.layouts, self.config.data.resize
                )
            except NoImages as error:
                if self.asked:  # for these passes by name
                    raise
                absent.append(error)
                continue
            found[way] = [images]
            self.say(images.line())
        for problem in absent:
            if not found:
                raise problem
            self.say(f"note: {problem}")
        self._settled(
            {
                "images": str(folder),
                "sessions": identity.sessions_fingerprint(sessions),
            }
        )
        return sessions, found

    def _made(self) -> tuple[list[Session], dict[str, list[Images]]]:
        """Images of the configured editor: made, where they are not there yet."""
        c, saved = self.config, self.about.get("generated", {})
        wanted = [[way, sample] for way in c.passes for sample in range(1, c.samples + 1)]
        absent = [one for one in wanted if one not in saved.get("done", [])]
        if absent and c.does("generate"):
            sessions = self._generate(wanted)
        elif absent:
            way, sample = absent[0]
            part = f"{way}, sample {sample}" if c.samples > 1 else way
            # Those of a folder that is not named now are none.
            which = f"not all images of {part}" if "settings" in saved else "no images"
            raise ConfigError(f"--stages: {self.out} has {which} yet (accepted: generate first)")
        else:
            sessions = self._sessions(size=_sizes(saved["size"]))
            self._settled(self._generated(sessions, saved["size"]))
            if c.does("generate") and self.processes.on_main(lambda: self._gone(sessions, wanted)):
                sessions = self._generate(wanted)
        found = {
            way: [
                find_images(generations(self.out, sample), sessions, way, ("edival",))
                for sample in range(1, c.samples + 1)
            ]
            for way in c.passes
        }
        return sessions, found

    def _gone(self, sessions: Sequence[Session], wanted: Sequence[Sequence[Any]]) -> bool:
        """Whether an image that was made is there no more, as one that was torn and deleted."""
        names = file_names(sessions)
        files = [source_file(name) for name in names.values()]
        files += [turn_file(names[one.id], t) for one in sessions for t in range(len(one.turns))]
        return any(
            not (generations(self.out, sample) / way / file).is_file()
            for way, sample in wanted
            for file in files
        )

    def _generate(self, wanted: Sequence[Sequence[Any]]) -> list[Session]:
        c, processes = self.config, self.processes
        policy = open_policy(c.policy, processes, trains=False)
        own = own_schedule(policy)
        check_run(c, None, own, processes=processes.count, command="eval")
        demanded = demands(c, policy)
        sessions = self._sessions(**demanded)
        self._settled(self._generated(sessions, demanded["size"]))
        sampler = eval_sampler(c.rollout, c.eval, own).to(processes.device)
        for way, sample in wanted:
            generate(
                self.out,
                policy,
                sessions,
                sampler,
                c,
                processes,
                way=way,
                sample=sample,
                exact=self.kind.exact,
            )
            processes.wait()
            done = self.about["generated"]["done"]
            if [way, sample] not in done:
                done.append([way, sample])
            self._write()
        del policy, sampler
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for judges that look here
        return sessions

    def _generated(self, sessions: Sequence[Session], size: Any) -> dict[str, Any]:
        depends = {
            "heldout": identity.sessions_fingerprint(sessions),
            **identity.loaded_weights(self.config.policy),
        }
        settings = identity.named(self.config, depends)
        kept = {
            key: value
            for key, value in settings.items()
            if (key.startswith(SECTIONS) and not _unseen(key))
            or key in ("seed", "data.resize", *depends)
        }
        return {"settings": kept, "size": size}

    # ------------------------------------------------------------------------------------- judge

    def _judged(
        self,
        panel: Panel,
        name: str,
        file: str,
        sessions: Sequence[Session],
        images: Mapping[str, list[Images]],
    ) -> None:
        use = self.config.reward if name == "judged" else self.config.against
        judged = {
            "reward": identity.reward_fingerprint(panel),
            "names": list(panel.names),
            "title": ", ".join(str(one.function or one.name or "world") for _, one in use.uses),
            "released": all(bool(one.options.get("released")) for _, one in use.uses),
            "facts": panel.facts,
            "seed": self.config.seed,
        }
        of = {k: v for k, v in self.about["generated"].items() if k not in ("done", "made")}
        digest = _digest([self.name, of, judged])
        before = self.about.get(name)
        if before is not None and before.get("reward") != judged["reward"]:
            self.say(
                f"note: {self.out / file}: judged anew by {judged['title']}; the scores there were "
                f"by {before.get('title')}"
            )
        self.about[name] = self._dated(judged, self.about.get(name))
        judge(
            self.out / file,
            sessions,
            images,
            panel,
            self.processes,
            seed=self.config.seed,
            digest=digest,
            exact=self.kind.exact,
        )
        self._write()

    # ------------------------------------------------------------------------------------ report

    def _report(self, sessions: Sequence[Session], images: Mapping[str, list[Images]]) -> list[str]:
        """Of the main process."""
        if not (self.out / FILE_NAME).is_file():
            return [f"images: {generations(self.out)}"] if not self.config.images else []
        found = self._summary(FILE_NAME, sessions, "judged")
        other, curves = None, list[best_of.Curve]()
        there = (self.out / AGAINST_FILE).is_file() and "against" in self.about
        if there and seen_in(self.out / AGAINST_FILE) != seen_in(self.out / FILE_NAME):
            self.say(f"note: {AGAINST_FILE} is of other images, so it is left out")
        elif there:
            other = found["against"] = self._summary(AGAINST_FILE, sessions, "against")
            curves = self._best_of()
            found["best_of"] = best_of.written(curves)
        summary.write(self.out / summary.FILE_NAME, found)
        strips.write_strips(self.out, sessions, {way: of[0] for way, of in images.items()})
        files = [
            self.out / FILE_NAME,
            self.out / summary.FILE_NAME,
            *paper.write(self.out, paper.paper_table([found])),
            page.write_page(self.out, curves),
        ]
        said = text.lines(found, files)
        if other is None:
            return said
        table = best_of.table(curves)
        best = [] if table is None else ["", *laid_out(table)]
        title = other["judge"]["title"]
        return [f"The second judge (--against), {title}:", *text.lines(other), *best, "", *said]

    def _best_of(self) -> list[best_of.Curve]:
        """Of several samples, what the one reward would choose and the other thinks of that."""
        weights, names = self.config.credit.weights, self.about.get("judged", {}).get("names", [])
        mine, theirs = (read_rows(self.out / file) for file in (FILE_NAME, AGAINST_FILE))
        given = weights if names and set(names) <= set(weights) else None
        way = self.config.passes[0]
        return best_of_rows(mine, theirs, way=way, weights=given)

    def _summary(self, file: str, sessions: Sequence[Session], judge: str) -> dict[str, Any]:
        judged, ways = self.about.get(judge, {}), set(self.config.passes)
        about = self.about | {"judged": judged, "made": judged.get("made")}
        rows = [row for row in read_rows(self.out / file) if row.way in ways]
        return summary.summarise(rows, sessions, self.kind, about)

    # ---------------------------------------------------------------------------------- identity

    def _settled(self, generated: dict[str, Any]) -> None:
        """Records what images are of. Raises `ConfigError` where the folder's are of something
        else."""
        saved = self.about.get("generated")
        if saved is not None:
            for line in self._differences(saved, generated):
                raise ConfigError(
                    f"--out: {self.out} holds images of another benchmark: {line} (accepted: the "
                    f"same settings, or another folder)"
                )
            generated["done"] = saved.get("done", [])
        generated.setdefault("done", [])
        self.processes.on_main(lambda: self._lock.take(make=True))
        # Paths may have moved and defaults be spelt out since: images are of what they were of.
        kept = self._dated(generated, saved) if saved is None else saved
        self.about |= {
            "benchmark": self.name,
            "title": self.kind.title,
            "editor": self.about.get("editor", self.editor),
            "seed": self.config.seed,
            "date": self.about.get("date", kept["made"]["date"]),
            "generated": kept,
        }
        self._write()

    def _dated(self, part: dict[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
        """With where and when it was made; a start that finds it made changes nothing of that."""
        if saved is not None and {**part, "made": saved.get("made")} == dict(saved):
            return dict(saved)
        made = identity.provenance(self.processes.count, str(self.processes.device))
        return part | {"made": made}

    def _differences(self, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        if self.about.get("benchmark") != self.name:
            return [f"{self.about.get('benchmark')} then, {self.name} now"]
        if ("settings" in saved) != ("settings" in now):
            return ["made by an editor here, or found in a folder"]
        if "settings" not in now:
            return [
                f"{key} {saved.get(key)} then, {now[key]} now"
                for key in ("images", "sessions")
                if saved.get(key) != now[key]
            ]
        found = identity.differences(saved["settings"], now["settings"])
        told, was = {"heldout": "sessions"}, self.about.get("editor")
        if "weights" in found and was != self.editor:
            told["weights"] = "editor"  # by its name, of which a digest says less
            found["weights"] = (str(was), str(self.editor))
        return [f"{told.get(key, key)} {old} then, {new} now" for key, (old, new) in found.items()]

    def _write(self) -> None:
        if not self.processes.main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.about, indent=1, default=str)
        write_lines(self.out / IDENTITY, [text + "\n"])


def _checked(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What was read, as it was written."""
    for key in ("generated", "judged", "against"):
        part = found.get(key, {"made": {}})
        if not isinstance(part, dict) or any(
            not isinstance(part.get(name, kind()), kind) for name, kind in _KINDS.items()
        ):
            raise ConfigError(f"{file}: {key}: not as it was written (accepted: another --out)")
    return found


_KINDS: dict[str, type] = {"made": dict, "settings": dict, "done": list, "size": list}
"""What the parts of the file have."""


def _unseen(setting: str) -> bool:
    return any(
        setting == name or (name.endswith(".") and setting.startswith(name)) for name in UNSEEN
    )


def _digest(thing: Any) -> str:
    said = json.dumps(thing, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    return hashlib.sha256(said).hexdigest()[:24]


def _sizes(written: Any) -> Any:
    """As `sized` takes them, of JSON."""
    return (
        tuple(map(tuple, written)) if written and isinstance(written[0], list) else tuple(written)
    )
