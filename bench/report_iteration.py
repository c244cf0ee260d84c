"""Whole iterations in the report: the waterfall from the peers' plan to ours, transformers of real
sizes, growth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from bench.frame import Row
from bench.page import Page, cases, number, slug, where

PLAN = "peer-plan"  # what gains are counted from
PHASES = ("rollout", "reward", "credit", "old log-prob", "loss", "optimiser")
COLOURS = ("#0067ad", "#8a8f98", "#444444", "#d98032", "#3d9a5f", "#b04a5a")

EXPECTED = {
    "groups": "linear: groups share nothing but the calls (below 1 while a call's fixed cost "
    "shows)",
    "siblings": "linear, less what is shared: the source, the first instruction, the steps before "
    "the first window",
    "turns": "linear in tokens read; every turn attends to all before it, so above 1 once "
    "attention weighs",
    "steps": "rollout linear, loss flat (the window is fixed)",
    "tokens": "linear where matrix products weigh, towards 2 where attention does",
    "processes": "-1 with a core for each process",
}
"""What a sound implementation shows, as exponents of the seconds over the size; found ones stand
beside."""


def _phases(row: Row) -> dict[str, float]:
    found = row.extra.get("phases_s") or {}
    return {name: found[name] for name in PHASES if found.get(name)}


def iteration(page: Page) -> None:
    for case in cases(page.of(["iteration"])).values():
        first = case[0]
        groups, siblings, turns = first.shape
        page.add(
            f"## One iteration, {groups} groups of {siblings}, {turns} turns",
            "",
            f"{first.mode}; {where(first)}. All plans give the same texts and, within tolerance, "
            f"the same images, "
            "advantages, loss and gradient. *eager* is the trainer on the peers' arithmetic; "
            "*peer-plan* the iteration as published trainers execute it, its samples batched; "
            "every line below it has one habit more of ours (`bench/peer_plan.py`). The last "
            "step, to *editr2*, is the trainer itself: steps before the window shared, rollouts "
            "without advantage dropped from the walk, packed sessions where cheaper.",
            "",
        )
        ours = next((row for row in case if row.ours), None)
        if ours is None:
            continue
        named = [phase for phase in PHASES if any(phase in _phases(row) for row in case)]
        page.table(
            ("", "ms", "editr2 is", "images/s", "peak MiB", *(f"{phase}, s" for phase in named)),
            (
                (
                    f"**{row.provider}**" if row.ours else row.provider,
                    f"{number(row.p50_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})",
                    f"{row.p50_ms / ours.p50_ms:.2f} ×",
                    number(row.extra.get("images_per_s")),
                    number(row.peak_mib),
                    *(number(_phases(row).get(phase)) for phase in named),
                )
                for row in case
            ),
        )
        _gains(page, case, ours)
        _waterfall(page, case)


def _gains(page: Page, case: Sequence[Row], ours: Row) -> None:
    """Which gain comes from what, in words."""
    ladder = [row for row in case if row.provider.startswith("peer")]
    start = next((place for place, row in enumerate(ladder) if row.provider == PLAN), None)
    if start is not None:
        plan = ladder[start]
        steps = [
            (after.provider.removeprefix("peer "), before.p50_ms / after.p50_ms)
            for before, after in pairwise(ladder[start:])
        ]
        steps.append(("the trainer itself", ladder[-1].p50_ms / ours.p50_ms))
        product = ", ".join(f"{name} {gain:.2f} ×" for name, gain in steps)
        page.add(
            f"Gains over *{PLAN}*, one after the other: {product}; all together "
            f"{plan.p50_ms / ours.p50_ms:.2f} ×.",
            "",
        )
        for row in ladder[:start]:
            page.add(
                f"Over *{row.provider}*: samples batched {row.p50_ms / plan.p50_ms:.2f} ×, "
                f"*editr2* {row.p50_ms / ours.p50_ms:.2f} ×.",
                "",
            )
    for row in case:
        if share := row.extra.get("operator_share"):
            parts = " and ".join(f"{name} {part:.1%}" for name, part in share.items())
            page.add(f"Share of an iteration of *{row.provider}*: {parts}.", "")


def _waterfall(page: Page, case: Sequence[Row]) -> None:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        names = [row.provider for row in reversed(case)]
        for place, row in enumerate(reversed(case)):
            left = 0.0
            for phase, seconds in _phases(row).items():
                axis.barh(place, seconds, left=left, color=COLOURS[PHASES.index(phase)], height=0.7)
                left += seconds
            axis.text(left, place, f" {left:.2f} s", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        for phase, colour in zip(PHASES, COLOURS):
            axis.barh(0, 0, color=colour, label=phase)
        axis.legend(fontsize=8)
        axis.set_xlabel("seconds of an iteration (medians of its phases)")
        axis.margins(x=0.15)

    name = f"iteration-{slug(case[0].device)}-{'x'.join(map(str, case[0].shape))}"
    page.plot(name, "Seconds of an iteration by plan and phase", draw, (8.2, 0.42 * len(case) + 1))


def pruning(page: Page) -> None:
    for case in cases(page.of(["pruning"])).values():
        groups, siblings, turns = case[0].shape
        page.add(
            f"## Later turns left out (`rollout.prune`), {groups} groups of {siblings}, {turns} "
            f"turns",
            "",
            f"{case[0].mode}; {where(case[0])}. *filter* does not roll out what the filter leaves "
            f"untrained; advantages are the same, and the gradient differs by *max error* of its "
            f"largest entry.",
            "",
        )
        page.table(
            ("", "ms", "rollouts denoised, over turns", "rollout, s", "loss, s", "max error"),
            (
                (
                    f"**{row.provider}**" if row.ours else row.provider.removeprefix("peer: "),
                    f"{number(row.p50_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})",
                    str(row.extra.get("denoised_rollouts")),
                    number(_phases(row).get("rollout")),
                    number(_phases(row).get("loss")),
                    "" if row.max_error is None else f"{row.max_error:.0e}",
                )
                for row in case
            ),
        )


def real_peers(page: Page) -> None:
    rows = page.of(["real_peer"])
    if not rows:
        return
    page.add(
        "## Beside Flow-Factory's own trainer",
        "",
        "Its `GRPOTrainer` and our iteration, in turns in one process, on the same folder of "
        "random weights and the same sessions of one turn (`python -m bench real_peer CHECKOUT`; "
        "bench/real_peer.py says what is equal and what is not). Seconds: median (smallest to "
        "largest). *Peer / ours*: of the rounds' ratios. Transformer: samples without gradient + "
        "with; encoded: images through the autoencoder, an iteration. *Load*: of the machine over "
        "1 and 15 minutes; above the number of cores it had other work.",
        "",
    )

    def seconds(row: Row, phase: str) -> str:
        median, low, high = row.extra["seconds"][phase]
        return f"{number(median)} ({number(low)}–{number(high)})"

    for case in cases(rows).values():
        first = case[0]
        groups, siblings, steps, window, side = first.shape
        facts = first.extra
        whole, cpu = (
            f"**{median:.2f}** ({low:.2f}–{high:.2f})"
            for median, low, high in (facts["peer_over_ours"], facts["peer_over_ours_cpu"])
        )
        page.add(
            f"{first.mode}; {groups} × {siblings}, {steps} steps of which {window} are trained, "
            f"{side}² pixels, {first.dtype}, {first.rounds} rounds; {where(first)}, peer at "
            f"{facts['peer_commit']}, load {facts['load'][0]:g} and {facts['load'][1]:g}. "
            f"Peer / ours {whole}, of processor time {cpu}.",
            "",
        )
        page.table(
            ("", "an iteration, s", "rollout", "judge", "training", "transformer", "encoded"),
            (
                (
                    f"**{row.provider}**" if row.ours else row.provider,
                    *(seconds(row, phase) for phase in ("all", "rollout", "reward", "train")),
                    f"{row.extra['counts']['forward_rows']} + "
                    f"{row.extra['counts']['trained_rows']}",
                    str(row.extra["counts"]["encoded"]),
                )
                for row in case
            ),
        )


def levers(page: Page) -> None:
    rows = [row for row in page.of(["levers"]) if "smoke" not in row.mode]
    if not rows:
        return
    page.add(
        "## Levers of an editor's step",
        "",
        "Blocks of a transformer with LoRA, under autocast, each lever by itself against peft's "
        "layers as they come, in turns in one run (`python -m pytest bench/test_levers.py "
        "--full`). *Levers* are what `policy.*` settings and our adapters change; what is "
        "computed is the same but for rounding.",
        "",
    )
    page.table(
        ("", "", "ms", "× eager", "operators"),
        (
            (
                f"{row.mode}, {row.dtype}; {where(row)}" if place == 0 else "",
                row.provider,
                f"{number(row.p50_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})",
                number(row.speedup_vs_eager),
                str(row.launches or ""),
            )
            for case in cases(rows).values()
            for place, row in enumerate(case)
        ),
    )


def transformers(page: Page) -> None:
    rows = page.of(["transformer"])
    if not rows:
        return
    page.add(
        "## Transformers of real sizes",
        "",
        "Random weights, one denoising step rolled out and one trained, with the peers' "
        "arithmetic around the transformer and with our operators. *Operators*: the sampler's "
        "step or the loss (forward and backward), timed alone, as a share of the step. *MFU*: "
        "counted operations over the time, against the data sheet's dense bf16 rate. *Images/s*: "
        "of ten steps rolled out, of two trained.",
        "",
    )
    for case in cases(rows).values():
        first = case[0]
        page.add(
            f"{first.mode}, {first.shape} (batch, latent tokens), {first.dtype}; {where(first)}", ""
        )
        page.table(
            (
                "",
                "ms",
                "× eager",
                "images/s",
                "MFU",
                "peak MiB",
                "operators",
                "launches",
                "waits",
                "max error",
            ),
            (
                (
                    f"**{row.provider}**" if row.ours else row.provider,
                    f"{number(row.p50_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})",
                    number(row.speedup_vs_eager),
                    number(row.extra.get("images_per_s")),
                    "" if row.extra.get("mfu") is None else f"{row.extra['mfu']:.1%}",
                    number(row.peak_mib),
                    ""
                    if row.extra.get("operator_share") is None
                    else f"{row.extra['operator_share']:.2%}",
                    "" if row.launches is None else str(row.launches),
                    "" if row.host_syncs is None else str(row.host_syncs),
                    "" if row.max_error is None else f"{row.max_error:.0e}",
                )
                for row in case
            ),
        )
    shares = [
        (row.extra["operator_share"], row)
        for row in rows
        if not row.ours and row.extra.get("operator_share") is not None and row.driver is not None
    ]
    if shares:
        share, row = min(shares, key=lambda pair: pair[0])
        page.add(
            f"**Where kernels do not matter:** the eager arithmetic is {share:.2%} of the step of "
            f"{row.mode}, and no "
            "kernel can gain more than that there. At these sizes the gains are those of the plan "
            "above, the memory that is not allocated, and steps that wait for nobody and can be "
            "captured.",
            "",
        )
    else:
        page.add(
            "**No transformer of real size was run: no GPU was at hand.** By count (the bytes "
            "that the eager step moves against the transformer's operations) it is 0.1 to 1.6 % "
            "of a denoising step at 12 B parameters: kernels alone can gain no more than that "
            "there, and what pays is the plan of the iteration above.",
            "",
        )


def judged(page: Page) -> None:
    for case in cases(page.of(["judging"])).values():
        first = case[0]
        groups, siblings, turns = first.shape
        page.add(
            f"## Waiting for a judge: {groups} groups of {siblings}, {turns} turns",
            "",
            f"{first.mode}, {first.extra['calls']} calls; {where(first)}. *eager serial* calls it "
            "on the main thread when the rollout is done, *editr2* from several threads as turns "
            "are decoded, and *at once* is a judge that takes no time. Scores and advantages of "
            "all are equal to the bit.",
            "",
        )
        named = [phase for phase in PHASES if any(phase in _phases(row) for row in case)]
        page.table(
            ("", "ms", "× serial", "calls at once", *(f"{phase}, s" for phase in named)),
            (
                (
                    f"**{row.provider}**" if row.ours else row.provider,
                    f"{number(row.p50_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})",
                    number(row.speedup_vs_eager),
                    str(row.extra["at_once"]),
                    *(number(_phases(row).get(phase)) for phase in named),
                )
                for row in case
            ),
        )


def benchmarks_judged(page: Page) -> None:
    for case in cases(page.of(["benchmark_judging"])).values():
        first = case[0]
        sessions, turns = first.shape
        page.add(
            f"## The judge stage of a benchmark: {sessions} sessions of {turns} turns",
            "",
            f"{first.mode}, {first.extra['requests']} requests to a server on this machine; "
            f"{where(first)}. *at once* is a server that takes no time. The rows of all are equal.",
            "",
        )
        page.table(
            ("", "ms", "× one at a time", "requests at once"),
            (
                (
                    f"**{row.provider}**" if row.ours else row.provider,
                    f"{number(row.p50_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})",
                    number(row.speedup_vs_eager),
                    str(row.extra["at_once"]),
                )
                for row in case
            ),
        )


def full_sizes(page: Page) -> None:
    rows = page.of(["full_size"])
    if not rows:
        return
    page.add(
        "## Editors of full size, and what `editr2 check` says of them",
        "",
        "Iterations of the trainer on random weights, without text encoders (`python -m bench "
        "full_size`), beside the estimate for the same device. *Ratio*: measured over estimated. "
        "Memory is the most that was alive: of torch's allocator on a GPU, of the process on a "
        "CPU.",
        "",
    )

    def cells(said: float | None, seen: float | None, unit: float) -> tuple[str, str, str]:
        ratio = None if not said or seen is None else seen / said
        return number(said and said / unit), number(seen and seen / unit), number(ratio)

    found = []
    for case in cases(rows).values():
        by_name = {row.provider: row for row in case}
        if by_name.keys() >= {"editr2 check", "editr2"}:
            said, seen = by_name["editr2 check"], by_name["editr2"]
            name = (
                f"{seen.mode}, {seen.shape} (sessions, siblings, pixels), {seen.dtype}; "
                f"{where(seen)}"
            )
            times = cells(said.p50_ms, seen.p50_ms, 1000)
            found.append((name, *times, *cells(said.peak_mib, seen.peak_mib, 1024)))
    page.table(
        ("", "s, estimated", "measured", "ratio", "GiB, estimated", "measured", "ratio"), found
    )


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log(y) over log(x) by least squares; None with fewer than two sizes."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum(
        (x - mean_x) ** 2 for x, _ in logs
    )


def growth(page: Page) -> None:
    rows = [row for row in page.of(["growth"]) if row.extra.get("size")]
    for device in dict.fromkeys(row.device for row in rows):
        of = [row for row in rows if row.device == device]
        axes: dict[str, list[Row]] = {}
        for row in of:
            axes.setdefault(row.mode, []).append(row)
        for found in axes.values():
            found.sort(key=lambda row: row.extra["size"])
        page.add(
            f"## Growth on {device}",
            "",
            "Time of an iteration (of *tokens*: of one step rolled out and trained) over one "
            "size, the others held; "
            f"exponents are slopes on log-log axes. {where(of[0])}.",
            "",
        )

        def of_phase(found: list[Row], phase: str) -> float | None:
            return exponent([(row.extra["size"], _phases(row).get(phase, 0.0)) for row in found])

        page.table(
            ("over", "sizes", "ms", "exponent", "rollout", "loss", "should be"),
            (
                (
                    axis,
                    ", ".join(str(row.extra["size"]) for row in found),
                    ", ".join(number(row.p50_ms) for row in found),
                    _two(exponent([(row.extra["size"], row.p50_ms) for row in found])),
                    _two(of_phase(found, "rollout")),
                    _two(of_phase(found, "loss")),
                    EXPECTED.get(axis, ""),
                )
                for axis, found in axes.items()
            ),
        )
        _curves(page, device, axes)


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _curves(page: Page, device: str, axes: dict[str, list[Row]]) -> None:
    columns = min(3, len(axes))
    height = math.ceil(len(axes) / columns)

    def draw(figure: Any) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        panels = list(figure.subplots(height, columns, squeeze=False).flat)
        for panel, (axis, found) in zip(panels, axes.items()):
            sizes = [row.extra["size"] for row in found]
            panel.plot(
                sizes,
                [row.p50_ms / 1e3 for row in found],
                "o-",
                color="black",
                label="all",
                markersize=4,
            )
            for phase, colour in zip(PHASES, COLOURS):
                known = [
                    (row.extra["size"], _phases(row)[phase])
                    for row in found
                    if phase in _phases(row)
                ]
                if phase in ("rollout", "loss") and known:
                    panel.plot(
                        *zip(*known), "o-", color=colour, label=phase, markersize=3, linewidth=1
                    )
            panel.set(xscale="log", yscale="log", title=axis, xlabel="size", ylabel="s")
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            for axis_of in (panel.xaxis, panel.yaxis):
                axis_of.set_minor_formatter(NullFormatter())
            panel.grid(True, which="both", linewidth=0.2)
            panel.legend(fontsize=8)
        for panel in panels[len(axes) :]:
            panel.set_axis_off()

    page.plot(
        f"growth-{slug(device)}",
        f"Growth of an iteration on {device}",
        draw,
        (3.4 * columns, 2.9 * height),
    )


def sessions(page: Page) -> None:
    rows = page.of(["session_forward"])
    if not rows:
        return
    page.add(
        "## Training forward of whole sessions",
        "",
        "Forward and backward of [rollouts, turns, places], one loss and one gradient: *rebuild* "
        "reads the context again for every trained step and answer, *incremental* keeps its keys "
        "and values, *packed* runs a session in one forward.",
        "",
    )
    page.table(
        ("", "ms", "× rebuild", "peak MiB", "max error"),
        (
            (
                f"{row.shape}, {row.mode}: {row.provider}",
                f"{number(row.p50_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})",
                number(row.speedup_vs_eager),
                number(row.peak_mib),
                "" if row.max_error is None else f"{row.max_error:.0e}",
            )
            for case in cases(rows).values()
            for row in case
        ),
    )


SECTIONS: list[Callable[[Page], None]] = [
    iteration,
    pruning,
    judged,
    benchmarks_judged,
    real_peers,
    levers,
    transformers,
    full_sizes,
    sessions,
    growth,
]
