"""What a run will do, how much memory it takes and how long: arithmetic over the settings, times
measured costs.

`plan` lists every model call of an iteration (and of an evaluation) with its batch; `memory` and
`hours` are sums over it. The estimate is of the worst case in one respect: every turn has an
advantage, so all of them are replayed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from editr2.check.devices import Device
from editr2.check.editors import TRAINS, Editor, Sizes
from editr2.check.judges import Judging, Measured, Room, judging, room, waiting
from editr2.check.links import MACHINE, gather_seconds, sum_seconds
from editr2.check.meter import Cost
from editr2.config import Config, PolicyConfig
from editr2.policies.configured import settled_branches
from editr2.rl.losses import LOSSES
from editr2.rl.replay import sessions_at_once
from editr2.rl.rules import batches
from editr2.rl.sampler import Sampler

PHASES = ("rollout", "encode", "reward", "train", "evaluate", "strips")
STRIPS = 2
"""Film-strips are drawn before and after training."""
GATHERED = 3
"""Times the largest block that FSDP2 takes for whole ones: the block that computes, the buffer that
it was copied out of (kept until the next copy), and the buffer into which the next block is
gathered meanwhile."""
REDUCED = 3
"""Times the largest block that gradients of sharded weights take before they are reduced: the
block's own, the buffer that they are copied into, and that of the block before, on its way."""


WITHOUT, WITH_ALL = (f"activations, train, {how}" for how in ("off", "all"))
"""Parts of the memory that are there to be compared: with other checkpointing than is asked for."""


COMPILED = ("velocity", "train")
"""Steps that run in the blocks that `policy.compile` compiles, or nearly."""


@dataclass(frozen=True)
class Call:
    """`times` calls of an editor's step with `batch` samples at a turn (from 0), in a phase of the
    run."""

    phase: str
    step: str
    batch: int
    turn: int
    times: float = 1.0


def _shares(turns: Sequence[int]) -> list[float]:
    """The share of sessions that have a first, a second, ... turn."""
    return [sum(n > t for n in turns) / len(turns) for t in range(max(turns))]


def _batches(count: int, most: int) -> list[int]:
    return [min(most, count - i) for i in range(0, count, most)]


def _forwards(rows: Sequence[int], places: int, micro_batch: int | None) -> list[tuple[int, int]]:
    """(turn of the first row, batch) of the training forwards over rows that come turn by turn: one
    turn and place after the other, or `micro_batch` rows whatever they are of."""
    if micro_batch is None:
        return [(turn, count // places) for turn, count in enumerate(rows) for _ in range(places)]
    turns = [turn for turn, count in enumerate(rows) for _ in range(count)]
    return [(turns[i], min(micro_batch, len(turns) - i)) for i in range(0, len(turns), micro_batch)]


def _packed(rows: Sequence[int], places: int, micro_batch: int | None) -> list[tuple[int, int]]:
    """(turn, batch) of what packed forwards run, turn by turn: the tokens and the attention that
    walking would, each turn's places together."""
    most = rows[0]
    if micro_batch is not None:
        most = min(most, sessions_at_once([places] * len(rows), micro_batch))
    return [
        (turn, max(1, round(sessions * count / rows[0])) * places)
        for sessions in _batches(rows[0], most)
        for turn, count in enumerate(rows)
    ]


def _walk(
    phase: str,
    editor: Editor,
    groups: int,
    siblings: int,
    shares: Sequence[float],
    *,
    generates: bool,
    reads: bool,
    encodes: tuple[bool, bool] = (True, True),
) -> list[Call]:
    """The calls of a walk through `groups` sessions besides its velocities. reads: instructions are
    not cached. encodes: nor are sources, outputs."""
    calls = []
    side = "encode" if phase == "rollout" else phase
    for turn, share in enumerate(shares):
        rows = max(1, round(groups * siblings * share))
        step = "encode" if encodes[turn > 0] else "derive"
        calls.append(Call(side, step, rows if turn else groups, turn))
        if turn and editor.writes_text and generates:
            calls.append(Call(phase, "intend", rows, turn))
        if editor.thinks and generates:
            calls.append(Call(phase, "think", rows, turn))
        if reads:
            apart = editor.thinks or (turn and (editor.prompt_per_output or editor.writes_text))
            calls.append(
                Call(side, "instruct", rows if apart else max(1, round(groups * share)), turn)
            )
        if generates:
            calls.append(Call(side, "decode", rows, turn))
    return calls


def _group_rollout(
    phase: str,
    config: Config,
    editor: Editor,
    sampler: Sampler,
    groups: int,
    shares: Sequence[float],
) -> list[Call]:
    """The calls of a rollout of whole groups."""
    r = config.rollout
    calls: list[Call] = []
    for size in _batches(groups, r.groups_per_batch):
        calls += _walk(phase, editor, size, r.siblings, shares, generates=True, reads=True)
        for turn, share in enumerate(shares):
            rows = max(1, round(size * r.siblings * share))
            alone = 0.0  # steps that a group's first rollout takes for its siblings
            if not turn and r.shared_noise and sampler.window and not editor.thinks:
                alone = (sampler.first_start + sampler.last_start) / 2
                calls.append(Call(phase, "velocity", size, turn, alone))
            calls.append(Call(phase, "velocity", rows, turn, sampler.steps - alone))
    return calls


def plan(
    config: Config, editor: Editor, sampler: Sampler, turns: Sequence[int], processes: int
) -> list[Call]:
    """The calls of one iteration of the process with most to do. turns: of every session."""
    r, t, shares = config.rollout, config.train, _shares(turns)
    groups = -(-r.sessions // processes)
    calls: list[Call] = []
    calls += _group_rollout("rollout", config, editor, sampler, groups, shares)
    prompts = groups * sum(shares) * (r.siblings if editor.prompt_per_output else 1)
    again = editor.read_again(round(prompts))
    outputs = round(groups * r.siblings * sum(shares[1:]))
    encodes = (editor.encodes_again(0, groups), editor.encodes_again(1, outputs))
    loss = LOSSES[t.loss]
    places, without = loss.places(t, sampler), len(loss.weights(t))
    first = loss.ratio and t.minibatches > 1  # old log-probs, before any weight moves
    for size in _batches(groups, r.groups_per_batch):
        walks = t.updates * (1 + without) + first
        walk = _walk(
            "train",
            editor,
            size,
            r.siblings,
            shares,
            generates=False,
            reads=again,
            encodes=encodes,
        )
        calls += [Call(c.phase, c.step, c.batch, c.turn, walks) for c in walk]
        turns_rows = [max(1, round(size * r.siblings * share)) for share in shares]
        forwards = _forwards([n * places for n in turns_rows], places, t.rows)
        answers = list(enumerate(turns_rows))
        if t.packed == "on":
            forwards = _packed(turns_rows, places, t.rows)
            answers = [(turn, batch // places) for turn, batch in forwards]
        for turn, batch in forwards:
            calls.append(Call("train", "train", batch, turn, t.updates))
            calls.append(Call("train", "velocity", batch, turn, t.updates * without + first))
        if editor.writes_text and t.text_weight != 0:
            calls += [Call("train", "answer", n, turn, t.updates) for turn, n in answers if turn]
        if editor.thinks and t.text_weight != 0:
            calls += [Call("train", "answer thought", n, turn, t.updates) for turn, n in answers]
    return [c for c in calls if c.times]


def _rolled_for_strips(config: Config, heldout: int) -> int:
    """Sessions whose groups a drawing of the film-strips rolls out."""
    return min(config.eval.strips, heldout) if config.eval.strips_from == "groups" else 0


def strips_plan(
    config: Config, editor: Editor, sampler: Sampler, turns: Sequence[int], processes: int
) -> list[Call]:
    """The calls of one drawing of the report's film-strips, whole groups, of the process with most
    to do. turns: of held-out sessions."""
    shown = turns[: _rolled_for_strips(config, len(turns))]
    groups = -(-len(shown) // processes)
    return (
        _group_rollout("strips", config, editor, sampler, groups, _shares(shown)) if shown else []
    )


def evaluation_plan(
    config: Config, editor: Editor, sampler: Sampler, turns: Sequence[int], processes: int
) -> list[Call]:
    """The calls of one evaluation: a rollout of every held-out session. turns: of each of them."""
    if config.eval.off:
        return []
    shares = _shares(turns)
    calls: list[Call] = []
    for size in _batches(-(-len(turns) // processes), 4 * config.rollout.groups_per_batch):
        walk = _walk("evaluate", editor, size, 1, shares, generates=True, reads=True)
        velocities = [
            Call("evaluate", "velocity", max(1, round(size * share)), turn, sampler.steps)
            for turn, share in enumerate(shares)
        ]
        calls += [*walk, *velocities]
    return calls


def sharded(policy: PolicyConfig, processes: int) -> bool:
    """Whether the transformer's weights are shared out over the processes: the frozen ones under
    LoRA, else all of them."""
    return policy.shard and processes > 1


def sharers(policy: PolicyConfig, processes: int) -> int:
    """How many processes hold one copy of what is shared out."""
    return (policy.shard_group or processes) if sharded(policy, processes) else 1


def gathered(sizes: Sizes, *, whole: bool) -> tuple[int, float]:
    """Bytes of weights that a forward gathers, and in how many gathers: at least, where blocks
    differ in size. whole: what trains is shared out, too."""
    moved = sizes.weights + (sizes.trained if whole else 0)
    return moved, ((moved - sizes.outside) / sizes.block if sizes.block else 1) + 1


def merged(calls: Sequence[Call]) -> list[Call]:
    """Equal calls as one."""
    times: dict[Call, float] = defaultdict(float)
    for c in calls:
        times[replace(c, times=0.0)] += c.times
    return [replace(c, times=n) for c, n in times.items()]


@dataclass(frozen=True)
class Estimate:
    """Of one process, but for the host.

    memory: bytes by part. peaks: bytes alive in each phase. host: bytes of weights that all
    processes of a machine hold there, at most. gathering: seconds that bringing sharded weights
    together once takes. seconds: by phase, of an iteration (evaluate: of one evaluation; strips: of
    one drawing). flops, train_forwards: of an iteration. evaluations: how many. optimizer_steps: of
    the run. judges: of an iteration. judged_besides: seconds of waiting for them in evaluations and
    drawings, of the run.
    """

    memory: dict[str, int]
    peaks: dict[str, int]
    host: dict[str, int]
    gathering: float
    seconds: dict[str, float]
    flops: float
    evaluations: int
    rollout_forwards: int
    train_forwards: int
    optimizer_steps: int
    judges: Sequence[tuple[Measured, Judging]] = ()
    judged_besides: float = 0.0

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def hours(self, iterations: int) -> dict[str, float]:
        """By phase, of the whole run."""
        times = {"evaluate": self.evaluations, "strips": STRIPS}
        hours = {p: s * times.get(p, iterations) / 3600 for p, s in self.seconds.items()}
        hours["reward"] += self.judged_besides / 3600
        return hours


@dataclass(frozen=True)
class Traffic:
    """What a call of the transformer takes on its device, and what it waits for beside that.

    gathering: seconds of bringing sharded weights together once; copying: of copying them out of
    their buffer, which the device does. reducing: of adding up the gradients of sharded weights
    that train. apart: whether guidance has branches that run one after the other.
    """

    config: Config
    editor: Editor
    device: Device
    gathering: float
    copying: float
    reducing: float
    apart: bool

    @classmethod
    def of(cls, config: Config, editor: Editor, device: Device, processes: int) -> Traffic:
        p, sizes = config.policy, editor.sizes()
        shares, gathering, copying, reducing = sharers(p, processes), 0.0, 0.0, 0.0
        if shares > 1:
            moved, pieces = gathered(sizes, whole=not p.lora_rank)
            gathering = gather_seconds(moved, pieces, shares, device)
            copying = 2 * moved / device.speed.bandwidth
            if not p.lora_rank:
                # Summed among who shares a copy, and each one's part over the copies.
                reducing = gather_seconds(sizes.trained, pieces, shares, device)
                reducing += sum_seconds(sizes.trained / shares, processes // shares, device)
        apart = settled_branches(p, processes).branches == "apart"
        apart = apart and p.guidance != 1
        return cls(config, editor, device, gathering, copying, reducing, apart)

    def passes(self, call: Call) -> int:
        """Forwards of the transformer, one after the other."""
        return self.editor.passes(call.step, self.apart)

    def gathers(self, call: Call) -> int:
        """How often it brings the weights together: the backward pass does once more."""
        return self.passes(call) * (2 if call.step in TRAINS else 1)

    def seconds(self, call: Call, cost: Cost) -> tuple[float, float]:
        """Of computing, and of what moves meanwhile."""
        p, times = self.config.policy, self.gathers(call)
        carried = self.editor.carried(call.step) / self.device.link if p.offload else 0.0
        fused = p.compile == "on" and call.step in COMPILED
        computing = cost.seconds(self.device.speed, fused) + carried + times * self.copying
        return computing, times * self.gathering + self.reducing * (call.step == "train")


def estimate(
    config: Config,
    editor: Editor,
    device: Device,
    samplers: tuple[Sampler, Sampler],
    turns: tuple[Sequence[int], Sequence[int]],
    processes: int = 1,
    judges: Sequence[Measured] = (),
    apart: Sequence[Measured] = (),
    *,
    compared: bool = False,
) -> Estimate:
    """samplers: of training and of evaluation. turns: of every session to train on, and of every
    held-out one (evaluation off: of those shown as strips). judges: the rewards, as they were
    measured; of none the time is left out. apart: those of `eval.reward`, of which the memory alone
    counts. compared: the memory is also that with no block computed again (`WITHOUT`) and with all
    (`WITH_ALL`). Of sessions of several sizes: `mixed`."""
    if editor.mix:
        given = (device, samplers, turns, processes, judges, apart)
        return mixed(
            [(s, estimate(config, view, *given, compared=compared)) for s, view in editor.mix]
        )
    t, r = config.train, config.rollout
    calls = merged(plan(config, editor, samplers[0], turns[0], processes))
    evaluation = merged(evaluation_plan(config, editor, samplers[1], turns[1], processes))
    evaluation += merged(strips_plan(config, editor, samplers[0], turns[1], processes))
    again = config.policy.gradient_checkpointing
    costs = {c: editor.cost(c.step, c.batch, c.turn, again) for c in (*calls, *evaluation)}
    seconds, sizes = dict.fromkeys(PHASES, 0.0), editor.sizes()
    traffic = Traffic.of(config, editor, device, processes)
    for call, cost in costs.items():
        seconds[call.phase] += call.times * max(traffic.seconds(call, cost))
    mean = sum(turns[0]) / len(turns[0])
    chunks = batches(r, processes)
    walk = seconds["rollout"] + seconds["encode"]
    groups = -(-r.sessions // processes)
    asked = [(m, judging(m, groups, r.siblings, mean, chunks, walk)) for m in judges]
    seconds["reward"] = waiting(asked)
    during = t.iterations // config.eval.every if config.eval.every else 0
    evaluations = 0 if config.eval.off else 2 + during
    rolled = _rolled_for_strips(config, len(turns[1]))
    besides = 0.0
    for phase, times, shown, siblings, most in (
        ("evaluate", evaluations, len(turns[1]), 1, 4 * r.groups_per_batch),
        ("strips", STRIPS, rolled, r.siblings, r.groups_per_batch),
    ):
        if mine := -(-shown // processes):
            length, ends = sum(turns[1][:shown]) / shown, -(-mine // most)
            each = [(m, judging(m, mine, siblings, length, ends, seconds[phase])) for m in judges]
            besides += times * waiting(each)
    # AdamW reads and writes a weight, its gradient and two moments, and clipping reads the gradient
    # once more.
    steps = t.updates * t.minibatches
    stepped = sizes.trainable / (
        1 if config.policy.lora_rank else sharers(config.policy, processes)
    )
    seconds["train"] += steps * 9 * 4 * stepped / device.speed.bandwidth
    forwards = [c for c in calls if c.step in ("velocity", "train")]
    rewards = room([*judges, *apart], device.gpu, processes)
    return Estimate(
        *_memory(config, editor, list(costs), samplers[0], turns[0], processes, compared, rewards),
        _host(config, sizes, processes, rewards),
        traffic.gathering,
        seconds,
        sum(c.times * costs[c].total_flops for c in calls),
        evaluations,
        round(sum(c.times for c in forwards if c.phase == "rollout")),
        round(sum(c.times for c in forwards if c.phase == "train")),
        steps * t.iterations,
        asked,
        besides,
    )


def mixed(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Of sessions of several sizes, from what all of one size would take, with the share of each:
    memory as if all were of the one that takes most, time by the shares. Batches count as full."""
    each = [part for _, part in parts]
    return replace(
        max(each, key=lambda part: part.peak),
        peaks={phase: max(part.peaks[phase] for part in each) for phase in each[0].peaks},
        seconds={p: sum(share * part.seconds[p] for share, part in parts) for p in PHASES},
        flops=sum(share * part.flops for share, part in parts),
    )


SCORES = {"answer": "score", "answer thought": "score thought"}
"""Forward and backward of a text, and its forward alone."""


def _memory(
    config: Config,
    editor: Editor,
    calls: Sequence[Call],
    sampler: Sampler,
    turns: Sequence[int],
    processes: int,
    compared: bool,
    rewards: Room,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part, and alive in each phase."""
    r, t, p, sizes = config.rollout, config.train, config.policy, editor.sizes()
    stored = 2 if r.store_dtype == "bfloat16" else 4
    latent = torch.Size(editor.latent_shape).numel() * stored
    rollouts = -(-r.sessions // processes) * r.siblings * sum(turns) / len(turns)

    def largest(*steps: str, checkpointing: int | str = "off") -> int:
        found = {(c.step, c.batch, c.turn) for c in calls if c.step in steps}
        return max((editor.cost(*key, checkpointing).peak for key in found), default=0)

    def trained_on(checkpointing: int | str) -> int:
        """The most of a forward and backward pass. Packed, it keeps what it has of all turns.
        Walking, a turn's texts are scored before the first of its velocities, and one backward
        pass goes through both."""
        each: dict[tuple[str, int], int] = defaultdict(int)
        scored: dict[tuple[str, int], int] = {}
        for c in calls:
            if c.step == "train" or c.step in SCORES:
                peak = editor.cost(c.step, c.batch, c.turn, checkpointing).peak
                each[c.step, c.turn] = max(each[c.step, c.turn], peak)
            if c.step in SCORES:
                kept = editor.cost(SCORES[c.step], c.batch, c.turn, checkpointing).kept
                scored[c.step, c.turn] = kept
        if t.packed == "on":
            return sum(each.values())

        def beside(turn: int) -> int:
            return sum(kept for (_, at), kept in scored.items() if at == turn)

        return max(n + (beside(turn) if step == "train" else 0) for (step, turn), n in each.items())

    # Compiled blocks keep less than plain ones do; by how much is not modelled.
    trains = trained_on(p.gradient_checkpointing)
    # The context of everyone who is denoised together; walking, training in smaller batches copies
    # theirs out of it.
    denoised = {(c.batch, c.turn) for c in calls if (c.phase, c.step) == ("rollout", "velocity")}
    most = max(denoised, key=lambda at: editor.held(*at))
    contexts, branches = editor.held(*most), editor.branches(*most)
    copied = (
        max((editor.held(c.batch, c.turn) for c in calls if c.step == "train"), default=0)
        if t.rows and t.packed != "on"
        else 0
    )
    loss = LOSSES[t.loss]
    # x, x_next, and what the loss or a sampler of second order reads beside them.
    a_step = 2 + loss.keeps_velocity(t) + sampler.second_order
    copies = len(loss.weights(t)) + (t.ema is not None)
    shares, blocks, outside = sharers(p, processes), 0, 0
    if shares > 1:  # adapters are not; what is in no block stays whole after the first forward
        blocks, outside = GATHERED * sizes.block, sizes.outside
    trained, gradients = sizes.trained, sizes.trained
    if shares > 1 and not p.lora_rank:
        trained = -(-sizes.trained // shares)
        # Forwards that share a backward (branches of guidance, turns in one micro-batch) add up
        # their gradients before they are reduced.
        apart = p.guidance != 1 and settled_branches(p, processes).branches == "apart"
        several = (apart or t.rows is not None) and t.packed != "on"
        gradients = trained + (sizes.trained if several else REDUCED * sizes.block + outside)
    held = {"contexts": contexts + copied}
    if branches:
        held = {f"contexts, {name}": n for name, n in branches.items()}
        held["contexts, copied to train"] = copied
    memory = {
        "frozen weights": round(sizes.weights / shares),
        "gathered blocks": blocks + outside,
        "adapters" if p.lora_rank else "trained weights": trained,
        "gradients": gradients,
        "optimizer states": 2 * trained,
        "copies (reference, old, average)": copies * trained,
        "text encoders": sizes.text,
        "autoencoder": sizes.vae,
        "vision transformer": sizes.sight,
        "stored latents": round(rollouts * latent * (a_step * sampler.window + 1)),
        **held,
        "activations, rollout": largest("velocity", "intend", "think") + sizes.dequantized,
        "activations, encode and decode": largest("encode", "decode"),
        "activations, train": trains + sizes.dequantized,
        **rewards.parts,
    }
    for name, how in ((WITHOUT, "off"), (WITH_ALL, "all")) if compared else ():
        memory[name] = trained_on(how) + sizes.dequantized
    always = sum(memory[k] for k in ("frozen weights", "optimizer states", "stored latents"))
    always += trained + memory["copies (reference, old, average)"] + outside + contexts
    resident = 0 if p.offload else sum(sizes.beside)
    # Taken before a rollout and lent when it is judged; made ahead, the next one begins before.
    judged = rewards.stays + rewards.lent + rewards.beside
    peaks = {
        "rollout": always + resident + blocks + memory["activations, rollout"] + judged,
        "encode": always
        + (max(sizes.beside) if p.offload else resident)
        + largest("encode", "decode")
        + judged,
        "train": always
        + resident
        + blocks
        + memory["gradients"]
        + copied
        + trains
        + sizes.dequantized
        + (judged if r.ahead else rewards.stays),
    }
    if rewards.after:
        answering = always + resident + rewards.stays + rewards.lent + rewards.after
        peaks = {"judging": answering, **peaks}
    return memory, {phase: round(n) for phase, n in peaks.items()}


def _host(config: Config, sizes: Sizes, processes: int, rewards: Room) -> dict[str, int]:
    """Bytes of weights that all processes of a machine together hold on the host, those of rewards
    among them.
    At most: what is loaded in its file's own dtype is mapped and not copied (seen with safetensors
    0.8), and processes share the pages.
    """
    # Sharded, the first process alone loads the transformer. 4-bit weights are made on the device,
    # tensor by tensor: their own bytes stand for what is read meanwhile. Float8 ones are made of
    # what was read in policy.dtype, layer by layer.
    here = min(processes, MACHINE)
    loaders = 1 if sharded(config.policy, processes) else here
    beside = here * sum(sizes.beside)
    read = sizes.weights + sizes.float8 * (1 if config.policy.dtype == "bfloat16" else 3)
    kept = (beside if config.policy.offload else 0) + rewards.host
    host = {
        "loading": loaders * (read + sizes.trained) + beside + rewards.host,
        "training": kept,
    }
    if rewards.host_working:
        host["judging"] = kept + rewards.host_working
    if sharded(config.policy, processes) and not config.policy.lora_rank:
        # A checkpoint is put together on the first process's host: weights, moments and copies.
        t = config.train
        copies = len(LOSSES[t.loss].weights(t)) + (t.ema is not None)
        host["saving"] = (3 + copies) * sizes.trained + host["training"]
    return host
