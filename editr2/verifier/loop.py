"""A verifier's training from its start to its end: one loop for all of `OBJECTIVES`.

An iteration: examples of the run's stream -> blocks -> rows (asked, sampled, credited) -> loss ->
AdamW. State, checkpoints, optimiser step, metrics, lock and signals are the trainer's own
(`editr2.rl.state`, `editr2.rl.iteration.step`, `editr2.run`).

One process or many (torchrun), the same numbers to rounding: the stream and every trace's seed
follow from the run's seed and the example's place in the stream; a block is computed by one
process, with the same neighbours whichever that is; units are counted over all processes before any
gradient is taken, and gradients are summed once a step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from editr2.config.yaml import dump_yaml
from editr2.errors import CheckpointError, ConfigError, NonFiniteError, UserError, counted
from editr2.policies.parts import is_shared, part
from editr2.policies.sharding import place
from editr2.policies.weights import exchanged, snapshot, trainable
from editr2.rl.iteration import step
from editr2.rl.metrics import Clock
from editr2.rl.seeds import derive_seed
from editr2.rl.sentinel import RatioError
from editr2.rl.state import State
from editr2.run.checkpoint import latest_checkpoint
from editr2.run.folder import check_holds_no_runs, check_settings_are_ours, write_readme
from editr2.run.generators import capture_rng, seed_generators
from editr2.run.identity import (
    Identity,
    named,
    provenance,
)
from editr2.run.lock import RunLock
from editr2.run.processes import Processes, open_processes
from editr2.run.stop import Stop, ending_told
from editr2.run.trackers import open_sinks
from editr2.run.tracking import MetricsLog, Progress, read_metrics, rows_behind, write_whole
from editr2.verifier.heldout import Heldout, evaluate, read_heldout
from editr2.verifier.model import Reader, load_reader, weights_fingerprint
from editr2.verifier.objectives import OBJECTIVES, Asks, Block, Lesson, Objective, Part, Row
from editr2.verifier.saved import RESULT, read_result, write_result
from editr2.verifier.settings import GcpoConfig, RunConfig, run_problems


def train_verifier(name: str, config: RunConfig, *, resume_anyway: Sequence[str] = ()) -> Path:
    """Trains a verifier by an objective (a name of `OBJECTIVES`) and returns the run's folder; an
    unfinished run there is resumed. Its `verifier/` is a folder of transformers again.

    resume_anyway: what may differ from the run that is resumed, by name: settings, sections of
    them, or sessions (the examples), weights and prompts.

    Raises `UserError` subclasses for bad settings, data, weights or checkpoints, a run of something
    else in the folder, a ratio that is not 1 before the first update, or a NaN; and `Stopped`, once
    what is done is saved, after Ctrl-C, SIGTERM or SIGHUP.
    """
    for problem in run_problems(config):
        raise ConfigError(problem)
    _check_insisted(resume_anyway, config)
    processes, folder = open_processes(), Path(config.out)
    processes.on_main(lambda: check_settings_are_ours(folder))
    processes.on_main(lambda: check_holds_no_runs(folder))
    with RunLock(folder) as lock:
        processes.on_main(lambda: lock.take(make=False))
        seed_generators(config.seed)
        objective = OBJECTIVES[name]
        assert config.data.path is not None
        examples, left_out = objective.reads(config.data.path, "data.path")
        heldout = read_heldout(config)
        reader = load_reader(config.policy, "cpu")
        place(reader, config.policy.shard, processes, config.policy.shard_group)
        state = new_state(config, reader, reference=objective.reference(config))
        identity = processes.on_main(
            lambda: Identity(
                {
                    "sessions": examples_fingerprint(examples),
                    **({"heldout": heldout_fingerprint(heldout)} if heldout else {}),
                    "weights": weights_fingerprint(str(config.policy.weights)),
                    "prompts": reader.prompts.digest,
                    "objective": name,
                },
                provenance(processes.count, str(processes.device)),
            )
        )
        processes.on_main(lambda: lock.take(make=True))
        loop = _Loop(name, config, state, reader, examples, heldout, processes, identity)
        loop.notes += [lock.problem] if lock.problem else []
        if left_out:
            are = "is" if left_out == 1 else "are"
            loop.notes.append(f"{counted(left_out, 'trace')} cannot be read and {are} left out")
        loop.find_start(resume_anyway)
        return loop.run()


def new_state(config: RunConfig, reader: Reader, *, reference: bool) -> State:
    """At the start of a run: AdamW over what trains, and a copy of it where the start is asked."""
    t, live = config.train, trainable(reader.module)
    parts = {name: nn.Parameter(part(p)) for name, p in live.items() if is_shared(p)}
    groups = [{"params": list({**live, **parts}.values()), "base_lr": t.lr}]
    optimizer = torch.optim.AdamW(groups, lr=t.lr, betas=t.betas, weight_decay=t.weight_decay)
    state = State(
        cast(Any, reader),
        optimizer,
        reference=snapshot(reader.module) if reference else None,
        parts=parts,
    )
    state.drop_gradients()
    return state


def examples_fingerprint(examples: Sequence[Any]) -> str:
    """Of rows, and of the files of their pictures: sizes, and a block of each."""
    digest, seen = hashlib.sha256(), dict[Path, str]()
    for example in examples:
        taught = example.told.text if isinstance(example, Lesson) else None
        said: list[Any] = [example.id, taught]
        for edit in example.edits:
            said += [edit.instruction, [one.written() for one in edit.principles]]
            said += [_sampled(picture.path, seen) for picture in (edit.image, edit.edited)]
        digest.update(json.dumps(said).encode("utf-8", "surrogatepass") + b"\n")
    return f"{len(examples)} examples {digest.hexdigest()[:16]}"


def heldout_fingerprint(heldout: Heldout) -> str:
    return " and ".join(
        examples_fingerprint(examples) for examples in (heldout.lessons, heldout.pairs) if examples
    )


def _sampled(path: Path, seen: dict[Path, str]) -> str:
    if path not in seen:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            stream.seek(max(0, size // 2 - 2048))
            block = hashlib.sha256(stream.read(4096)).hexdigest()[:16]
        seen[path] = f"{size} {block}"
    return seen[path]


def _check_insisted(insisted: Sequence[str], config: RunConfig) -> None:
    settings = named(dataclasses.asdict(config), None)
    sections = {name.rpartition(".")[0] for name in settings} - {""}
    known = {"sessions", "heldout", "weights", "prompts", *settings, *sections}
    for name in insisted:
        if name not in known:
            raise ConfigError(
                f"--resume-anyway: {name!r} (accepted: sessions, heldout, weights, prompts, or a "
                f"setting such as train.lr or a section of them)"
            )


class _Lines(Progress):
    """What an iteration came to, in the objective's own numbers."""

    def said(self, row: Mapping[str, Any]) -> list[str]:
        shown = ("loss", "accuracy", "kl", "unread", "constant")
        found = [f"{name} {row[name]:.3g}" for name in shown if row.get(name) is not None]
        error = row.get("ratio_error")
        return found + ([f"|ratio-1| {error:.0e}"] if error is not None else [])


class _Loop:
    """A run from where it stands to its end."""

    def __init__(
        self,
        name: str,
        config: RunConfig,
        state: State,
        reader: Reader,
        examples: Sequence[Any],
        heldout: Heldout,
        processes: Processes,
        identity: Identity,
    ) -> None:
        self.name, self.config, self.state, self.reader = name, config, state, reader
        self.objective: Objective = OBJECTIVES[name]
        self.examples, self.heldout = examples, heldout
        self.processes, self.identity = processes, identity
        self.folder, self.asks = Path(config.out), Asks(reader)
        self.notes: list[str] = []
        self.saved: int | None = None
        self.resumed: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []  # of metrics.jsonl, that stand
        self._orders: dict[int, list[int]] = {}

    # ------------------------------------------------------------------------ where a run stands

    def find_start(self, insist: Sequence[str]) -> None:
        """Takes on the newest checkpoint of the run's folder, if there is one."""
        root, metrics = self.folder / "checkpoints", self.folder / "metrics.jsonl"
        found = self.processes.on_main(lambda: latest_checkpoint(root))
        if found is not None:
            seen = self.state.load(
                found,
                cast(Any, self.config),
                self.identity,
                rank=self.processes.index,
                insist=insist,
            )
            self.saved = self.state.iteration
            self.notes.append(f"resumed from {found} at iteration {self.saved}")
            self.notes += [f"changed since {seen.date}: {text}" for text in seen.told]
            insisted = {key: list(values) for key, values in seen.insisted.items()}
            self.resumed = {
                "iteration": self.saved,
                **self.identity.made,
                "insisted": insisted,
            }
            self.identity.resumed.extend([*seen.resumed, self.resumed])

        def read() -> list[dict[str, Any]]:
            if found is None and metrics.exists():
                # Nothing of it was saved, so nothing of it stands.
                if (self.folder / "config.yaml").exists():
                    metrics.unlink()
                elif metrics.stat().st_size:
                    raise CheckpointError(f"{metrics}: of something else (accepted: another --out)")
            write_whole(self.folder / "config.yaml", dump_yaml(self.config))
            rows = read_metrics(metrics)[0] if metrics.exists() else []
            return rows_behind(rows, self.state.iteration)

        self.rows = self.processes.on_main(read)

    def _standing(self) -> str:
        if self.saved is None:
            return (
                f"{self.folder} holds no finished iteration yet; the same command begins again "
                f"there"
            )
        return (
            f"{self.folder} is saved at iteration {self.saved} of "
            f"{self.config.train.iterations}; the same command goes on from there"
        )

    def _save(self) -> None:
        rng, held = self.processes.gather([self.state.rng]), self.state.held(self.processes)

        def write() -> None:
            self.log.sync()
            root, config = self.folder / "checkpoints", cast(Any, self.config)
            self.state.save(root, config, self.identity, rng, held)

        self.processes.on_main(write)
        self.saved = self.state.iteration

    # ------------------------------------------------------------------------------------ the run

    def run(self) -> Path:
        config, state, processes = self.config, self.state, self.processes
        iterations = config.train.iterations
        with (
            _Lines(iterations, start=state.iteration, enabled=processes.main) as self.progress,
            MetricsLog(
                self.folder / "metrics.jsonl",
                resume_iteration=state.iteration,
                resumed=self.resumed,
                sinks=open_sinks(
                    config, processes, None, at=state.iteration, note=self.progress.note
                ),
                enabled=processes.main,
            ) as self.log,
            Stop(processes, self._standing) as stop,
        ):
            for note in self.notes:
                self.progress.note(note)
            self._describe("at work, or stopped before its end")
            with ending_told(self._keep, self._standing):
                self._train(stop)
                self._finish()
                self._describe("finished")
        processes.wait()
        return self.folder

    def _describe(self, standing: str) -> None:
        """The folder's README.md."""
        made, run = self.identity.made, shlex.quote(self.config.out)
        again = f"editr2 verifier {self.name} --config {run}/config.yaml --out {run}"
        others = [("Follow it in a browser, also while it is at work", f"editr2 watch {run}")]
        self.processes.on_main(lambda: write_readme(self.folder, made, standing, again, others))

    def _keep(self) -> None:
        """Of a run that is stopped: what is done."""
        self.state.put_back()
        if self.state.iteration != (self.saved or 0):
            self._save()

    def _train(self, stop: Stop) -> None:
        config, state, processes = self.config, self.state, self.processes
        t, keep = config.train, config.checkpoint
        if not any(row.get("event") == "start" for row in self.rows):
            self._append(self._start_row())
        stop.give_up()
        while True:
            self._evaluate()
            if state.iteration >= t.iterations:
                break
            stop.agree()
            started = time.perf_counter()
            row = self._iteration(stop)
            state.elapsed += time.perf_counter() - started
            row["elapsed_s"] = state.elapsed
            self._append(row)
            self.progress.update(row)
            state.iteration += 1
            state.rng = capture_rng()
            if state.iteration % keep.every == 0 or state.iteration == t.iterations:
                self._save()
            stop.agree()
            stop.give_up()
        processes.lend()

    def _evaluate(self) -> None:
        """Of the weights that stand, where it is due and not there; leaves no trace in the run."""
        at, e = self.state.iteration, self.config.eval
        ends = at in (0, self.config.train.iterations)
        if not self.heldout or not (ends or (e.every and at % e.every == 0)):
            return
        if any(row.get("event") == "eval" and row["iteration"] == at for row in self.rows):
            return
        found = evaluate(self.heldout, self.asks, self.config, self.processes)
        self._append({"event": "eval", "iteration": at, **found})
        shown = "  ".join(
            f"{k} {found[k]:.4g}" for k in ("nll", "accuracy", "unread") if k in found
        )
        self.progress.note(f"iteration {at}, held out: {shown}")

    def _append(self, row: dict[str, Any]) -> None:
        self.log.append(row)
        self.rows.append(row)

    def _start_row(self) -> dict[str, Any]:
        weights = trainable(self.reader.module).values()
        return {
            "event": "start",
            "objective": self.name,
            "examples": len(self.examples),
            "heldout": {
                "traces": len(self.heldout.lessons),
                "pairs": len(self.heldout.pairs),
            },
            "trained_weights": sum(p.numel() for p in weights),
            "identity": dataclasses.asdict(self.identity),
        }

    def _finish(self) -> None:
        """The trained verifier as a folder of transformers, unless it is there."""
        state, processes = self.state, self.processes
        there = processes.on_main(lambda: read_result(self.folder / RESULT))
        if there is not None and there.get("iteration") == state.iteration:
            return
        held = state.held(processes)
        values = snapshot(self.reader.module) if held is None else held[0].get("policy", {})

        def write() -> str:
            facts = {
                "objective": self.name,
                "iteration": state.iteration,
                "weights": str(self.config.policy.weights),
                "weights_fingerprint": self.identity.depends["weights"],
            }
            prompt = self.asks.prompt(self.examples[0].edits[0])
            [said] = self.reader.sample([prompt], [0], temperature=0, max_tokens=16)
            with torch.no_grad():
                scored = self.reader.log_probs([prompt], [said.ids]).log_prob[0].cpu()
            config, device = self.config.policy, processes.device
            probe = (prompt, said.ids, scored)
            return write_result(self.folder / RESULT, config, values, facts, probe, device)

        self.progress.note(processes.on_main(write))

    # ------------------------------------------------------------------------------- an iteration

    def _iteration(self, stop: Stop) -> dict[str, Any]:
        """One batch and its updates; returns the metrics row."""
        config, state, processes, clock = self.config, self.state, self.processes, Clock()
        t = config.train
        updates = config.train.updates if isinstance(config, GcpoConfig) else 1
        minibatches = config.train.minibatches if isinstance(config, GcpoConfig) else 1
        with clock.phase("rollout"):
            first = state.iteration * t.batch
            asked = self._blocks([*range(first, first + t.batch)])
            mine = range(len(asked))[processes.share(len(asked))]
            blocks = {k: self.objective.roll(config, self.asks, asked[k], "train") for k in mine}
            processes.lend()
        units = self._units(blocks, minibatches)
        work = _Work(self, blocks, minibatches)
        sums, norms, losses = dict[str, float](), [], []
        for update in range(updates):
            for minibatch in range(minibatches):
                with clock.phase("loss"):
                    fresh = update == minibatch == 0
                    if fresh and updates * minibatches > 1:
                        work.remember()
                    remembers = updates * minibatches == 1
                    seen = work.backward(minibatch, units[minibatch], fresh, remembers)
                    losses.append(seen.pop("loss"))
                    for key, value in seen.items():
                        sums[key] = sums.get(key, 0.0) + value / updates
                stop.finish()
                with clock.phase("optimiser"):
                    norms.append(step(cast(Any, t), state, processes))
        for block in blocks.values():
            for key, value in block.counts.items():
                sums[key] = sums.get(key, 0.0) + value
        parts = processes.gather([(sums, sum(losses), work.errors, clock.seconds)])
        total = {
            key: math.fsum(part[0].get(key, 0.0) for part in parts)
            for key in sorted({key for part in parts for key in part[0]})
        }
        counted = max(1.0, math.fsum(units))
        row: dict[str, Any] = {
            "event": "train",
            "iteration": state.iteration,
            "loss": math.fsum(part[1] for part in parts) / (counted * updates),
            **self.objective.row({**total, "units": math.fsum(units)}),
            "grad_norm": sum(norms) / len(norms),
            "lr": state.optimizer.param_groups[0]["lr"],
        }
        if self.objective.old:
            for key in ("ratio_error", "sampled_error"):
                row[key] = max(part[2][key] for part in parts)
        row["seconds"] = {key: max(part[3][key] for part in parts) for key in clock.seconds}
        return row

    def _blocks(self, ordinals: Sequence[int]) -> list[list[tuple[int, Any]]]:
        """Places in the run's stream, with what stands there, block by block."""
        size = self.objective.block(self.config)
        found = [(ordinal, self._example(ordinal)) for ordinal in ordinals]
        return [found[at : at + size] for at in range(0, len(found), size)]

    def _example(self, ordinal: int) -> Any:
        """Every pass over the examples has an order of its own."""
        number, at = divmod(ordinal, len(self.examples))
        if number not in self._orders:
            noise = torch.Generator().manual_seed(derive_seed(self.config.seed, "order", number))
            order = torch.randperm(len(self.examples), generator=noise).tolist()
            self._orders = {
                number: order,
                **{k: v for k, v in self._orders.items() if k > number - 2},
            }
        return self.examples[self._orders[number][at]]

    def _units(self, blocks: Mapping[int, Block], minibatches: int) -> list[float]:
        """Of each minibatch, over all processes."""
        own = torch.zeros(minibatches, dtype=torch.float64)
        for number, block in blocks.items():
            own[number % minibatches] += block.units
        return [math.fsum(x) for x in zip(*self.processes.gather([own.tolist()]), strict=True)]


class _Work:
    """The blocks of this process, on their way to a gradient. old: log-probs of the weights that
    sampled, by the rows' place; errors: how far ratios were from 1 where they have to be 1."""

    def __init__(self, loop: _Loop, blocks: Mapping[int, Block], minibatches: int) -> None:
        self.loop, self.blocks, self.minibatches = loop, blocks, minibatches
        self.old: dict[tuple[int, int], Tensor] = {}
        self.errors = {"ratio_error": 0.0, "sampled_error": 0.0}
        writing = getattr(loop.config, "rollout", None)
        self.temperature = 1.0 if writing is None else writing.temperature

    def _parts(self, minibatch: int | None) -> Iterator[tuple[tuple[int, int], list[Row]]]:
        rows = self.loop.config.train.rows
        for number, block in self.blocks.items():
            if minibatch is None or number % self.minibatches == minibatch:
                for at in range(0, len(block.rows), rows):
                    yield (number, at), block.rows[at : at + rows]

    def _scored(self, rows: Sequence[Row]) -> Any:
        prompts, answers = [row.prompt for row in rows], [row.ids for row in rows]
        return self.loop.reader.log_probs(prompts, answers, self.temperature)

    @torch.no_grad()
    def remember(self) -> None:
        for key, rows in self._parts(None):
            self.old[key] = self._scored(rows).log_prob

    def backward(
        self, minibatch: int, units: float, fresh: bool, remembers: bool
    ) -> dict[str, float]:
        """The gradient of a minibatch's loss; returns sums over its rows. Raises, on all processes,
        what went wrong on any."""
        loop, sums, problem = self.loop, {"loss": 0.0}, None
        state, objective = loop.state, loop.objective
        for key, rows in self._parts(minibatch):
            reference = None
            if state.reference is not None:
                with torch.no_grad(), exchanged(loop.reader.module, state.reference):
                    reference = self._scored(rows).log_prob
            live = self._scored(rows)
            if objective.old and remembers:
                self.old[key] = live.log_prob.detach()
            part = Part(rows, live, self.old.get(key), reference)
            term = objective.term(loop.config, part)
            loss = float(term.loss.detach())
            if not math.isfinite(loss) and problem is None:
                where = f"iteration {state.iteration}, {rows[0].name}"
                problem = cast(UserError, NonFiniteError(f"loss: {loss} at {where}"))
            if fresh and objective.old:
                problem = problem or self._check_ratio(part)
            loop.processes.backward(term.loss / max(units, 1.0))
            sums["loss"] += loss
            for name, value in term.sums.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        found = [one for one in loop.processes.gather([problem]) if one is not None]
        if found:
            state.drop_gradients()
            raise found[0]
        return sums

    def _check_ratio(self, part: Part) -> UserError | None:
        """How far the first update's ratios are from 1, and what is wrong where that is too far,
        before any weight of the run has changed."""
        loop, live = self.loop, part.live.log_prob.detach()
        assert part.old is not None
        sampled = torch.zeros_like(live)
        for row, values in zip(part.rows, sampled, strict=True):
            assert row.written is not None
            values[: len(row.ids)] = torch.tensor(row.written.log_prob)
        for name, other in (("ratio_error", part.old), ("sampled_error", sampled)):
            error = (live - other).exp().sub(1).abs().masked_fill(~part.live.valid, 0.0)
            self.errors[name] = max(self.errors[name], float(error.max()))
            limit = tolerance(cast(GcpoConfig, loop.config))
            if loop.state.iteration == 0 and not float(error.max()) <= limit:
                at, token = divmod(int(error.argmax()), error.shape[1])
                cause = explain(loop.reader, cast(GcpoConfig, loop.config), part.rows[at], token)
                return RatioError(
                    f"ratio: differs from 1 by {float(error.max()):.3g} before any update "
                    f"(accepted: {limit:g}); {part.rows[at].name}, token {token + 1}: {cause}"
                )
        return None


def tolerance(config: GcpoConfig) -> float:
    """Of a ratio, by `train.ratio_tolerance`."""
    if config.train.ratio_tolerance is not None:
        return config.train.ratio_tolerance
    return 0.5 if config.policy.dtype == "bfloat16" else 1e-3


@torch.no_grad()
def explain(reader: Reader, config: GcpoConfig, row: Row, token: int) -> str:
    """What of sampling and scoring a trace is not the same: in this order, sampling and its
    repetition, the last layer and the model's own logits, sampling and scoring."""
    assert row.written is not None
    r, seen = config.rollout, row.written
    [again] = reader.sample(
        [row.prompt], [row.seed], temperature=r.temperature, max_tokens=r.max_tokens
    )
    if again.ids[: token + 1] != seen.ids[: token + 1]:
        return "sampled again by itself, it reads otherwise"
    scored = reader.log_probs([row.prompt], [row.ids], r.temperature).log_prob[0]
    logits = reader.logits(row.prompt, row.ids)[token].float() / r.temperature
    own = float(logits.log_softmax(-1)[row.ids[token]])
    if abs(own - float(scored[token])) > 0.1 * tolerance(config):
        return (
            f"its log-prob from the last layer is {float(scored[token]):.6g}, from the model's "
            f"logits {own:.6g} (accepted: a model whose logits are its last layer's)"
        )
    return (
        f"sampling token by token gave a log-prob of {seen.log_prob[token]:.6g}, scoring the whole "
        f"{float(scored[token]):.6g}"
    )
