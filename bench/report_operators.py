"""The operators in the report: what a reader wants first, speed-up by size, bandwidth, and a table
a case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from bench.frame import Row
from bench.page import Page, best, cases, elements, number, slug, where
from bench.sizes import NORMAL, NORMAL_FLOATS, NORMAL_INTEGERS, STEP

OPERATORS = (
    "sde_step",
    "sde_log_prob",
    "grpo_loss",
    "awm_loss",
    "nft_loss",
    "token_log_prob",
    "group_advantage",
    "philox_normal",
    "integrations",  # drop-ins for other trainers' steps and losses
)
EAGER, COMPILE, OURS = "#8a8f98", "#d98032", "#0067ad"


def by_device(page: Page) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in page.of(OPERATORS):
        found.setdefault(row.device, []).append(row)
    return found


def largest(rows: Iterable[Row]) -> list[list[Row]]:
    """Of every operator and mode of one device the case of the largest size, in the operators'
    order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for case in cases(rows).values():
        key = case[0].op, case[0].mode
        if best(case) is not None and elements(case[0]) >= elements(found.get(key, case)[0]):
            found[key] = case
    return sorted(found.values(), key=lambda case: (OPERATORS.index(case[0].op), case[0].mode))


def summary(page: Page) -> None:
    for device, rows in by_device(page).items():
        graphs = ", CUDA graphs included" if any(row.driver is not None for row in rows) else ""
        what = (
            f"The largest size of each; our fastest provider against the fastest eager and "
            f"compiled ones{graphs}."
        )
        page.add(f"## Operators on {device}", "", what, "")
        lines = []
        for case in largest(rows):
            ours = best(case)
            assert ours is not None
            lines.append(
                (
                    f"`{ours.op}` {ours.mode} {ours.shape}, {ours.dtype}: {ours.provider}",
                    number(ours.p50_ms),
                    number(ours.speedup_vs_eager),
                    number(ours.speedup_vs_compile),
                    number(ours.peak_mib),
                    number(ours.copy_percent),
                )
            )
        page.table(("", "ms", "× eager", "× compile", "peak MiB", "% copy"), lines)
        by_size(page, device, rows)
        bandwidth(page, device, rows)


def by_size(page: Page, device: str, rows: list[Row]) -> None:
    """One panel an operator and mode that was timed at more than one size of one dtype."""
    curves: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for case in cases(rows).values():
        if (ours := best(case)) is not None:
            curves.setdefault((ours.op, ours.mode), {}).setdefault(ours.dtype, []).append(ours)
    panels = {
        key: of
        for key, of in curves.items()
        if len({elements(r) for rs in of.values() for r in rs}) > 1
    }
    if not panels:
        return
    ordered = sorted(panels, key=lambda key: (OPERATORS.index(key[0]), key[1]))
    columns = min(3, len(ordered))
    height = math.ceil(len(ordered) / columns)

    def draw(figure: Any) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes = list(figure.subplots(height, columns, squeeze=False).flat)
        for axis in axes[len(ordered) :]:
            axis.remove()
        for axis, key in zip(axes, ordered):
            points = sorted((row for of in panels[key].values() for row in of), key=elements)
            sizes = sorted({elements(row) for row in points})
            style = (
                "o-" if len(sizes) == len(points) else "o"
            )  # several dtypes of one size are no curve
            for column, colour, name in (
                ("speedup_vs_eager", EAGER, "eager"),
                ("speedup_vs_compile", COMPILE, "compile"),
            ):
                known = [
                    (elements(row), y) for row in points if (y := getattr(row, column)) is not None
                ]
                if known:
                    axis.plot(
                        *zip(*known),
                        style,
                        color=colour,
                        label=f"× {name}",
                        markersize=4,
                        linewidth=1,
                    )
            axis.axhline(1, color="black", linewidth=0.7)
            axis.set(xscale="log", yscale="log", title=f"{key[0]}\n{key[1]}", xlabel="elements")
            axis.xaxis.set_minor_formatter(NullFormatter())
            if len(sizes) <= 4:
                axis.set_xticks(sizes, [thousands(size) for size in sizes])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.title.set_fontsize(9)
            axis.grid(True, which="both", linewidth=0.2)
            axis.legend(fontsize=8)

    page.plot(
        f"speedup-{slug(device)}",
        f"Speed-up by size on {device}",
        draw,
        (3.4 * columns, 2.9 * height),
    )


def thousands(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"


def bandwidth(page: Page, device: str, rows: list[Row]) -> None:
    """How near to a copy: the bytes that our plan moves, over the time of each provider."""
    bars: list[tuple[str, list[tuple[float, str]]]] = []
    for case in largest(rows):
        ours = best(case)
        if ours is None or ours.copy_percent is None:
            continue
        of = [
            (row, colour)
            for row, colour in ((best(case, "eager"), EAGER), (best(case, "compile"), COMPILE))
            if row
        ]
        of.append((ours, OURS))
        values = [(ours.copy_percent * ours.p50_ms / row.p50_ms, colour) for row, colour in of]
        bars.append((f"{ours.op}\n{ours.mode}\n{ours.shape}, {ours.dtype}", values))
    if not bars:
        return

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for place, (_, values) in enumerate(reversed(bars)):
            for k, (percent, colour) in enumerate(values):
                y = place + 0.27 * (len(values) / 2 - k - 0.5)
                axis.barh(y, percent, height=0.25, color=colour)
                axis.text(percent, y, f" {percent:.0f}", va="center", fontsize=7)
        axis.set_yticks(range(len(bars)), [name for name, _ in reversed(bars)], fontsize=7)
        axis.axvline(100, color="black", linewidth=0.8)
        axis.set_xlabel("% of a copy's bandwidth, had each moved the bytes of our plan")
        for colour, name in ((EAGER, "best eager"), (COMPILE, "best compile"), (OURS, "editr2")):
            axis.barh(0, 0, color=colour, label=name)
        axis.legend(fontsize=8, loc="lower right")

    page.plot(
        f"roofline-{slug(device)}",
        f"Bandwidth against a copy on {device}",
        draw,
        (8.2, 0.75 * len(bars) + 1),
    )
    steps = [
        row
        for case in largest(rows)
        for row in case
        if row.op in ("sde_step", "philox_normal") and row.flops
    ]
    if steps:
        page.add(
            f"Noise made in the kernel is work, not traffic: {NORMAL_INTEGERS} integer and "
            f"{NORMAL_FLOATS} floating "
            "operations a normal (ten rounds of Philox shared by four, a logarithm, a root, a "
            "sine and a cosine of our own by two; no fused multiply-add, so that all backends "
            "give the same bits). A step of fp32 latents and a bf16 velocity moves 10 bytes an "
            "element: it stays below a copy's bandwidth wherever the device does fewer "
            f"than {(NORMAL + STEP) / 10:.1f} such operations in the time of a byte.",
            "",
        )
        head = ("", "operations an element", "G operations/s", "GB/s", "copy GB/s")
        page.table(
            head,
            (
                (
                    f"`{row.op}` {row.mode} {row.shape}: {row.provider}",
                    number(row.flops / elements(row)),
                    number(row.flops / row.p50_ms / 1e6),
                    number(None if row.bytes is None else row.bytes / row.p50_ms / 1e6),
                    number(row.copy_gb_s),
                )
                for row in steps
                if row.flops
            ),
        )


def tables(page: Page) -> None:
    """Everything."""
    rows = page.of(OPERATORS)
    if not rows:
        return
    page.add("## Every case", "")
    for op in OPERATORS:
        of = cases(row for row in rows if row.op == op)
        if of:
            page.add(f"### `{op}`", "")
        for case in sorted(
            of.values(), key=lambda case: (case[0].device, case[0].mode, -elements(case[0]))
        ):
            first = case[0]
            page.add(f"{first.mode}, {first.shape}, {first.dtype}; {where(first)}", "")
            page.table(
                (
                    "",
                    "ms",
                    "× eager",
                    "× compile",
                    "peak MiB",
                    "% copy",
                    "launches",
                    "waits",
                    "max error",
                ),
                (
                    (
                        f"**{row.provider}**" if row.ours else row.provider,
                        f"{number(row.p50_ms)} ({number(row.p20_ms)}–{number(row.p80_ms)})",
                        number(row.speedup_vs_eager),
                        number(row.speedup_vs_compile),
                        number(row.peak_mib),
                        number(row.copy_percent),
                        "" if row.launches is None else str(row.launches),
                        "" if row.host_syncs is None else str(row.host_syncs),
                        "" if row.max_error is None else f"{row.max_error:.0e}",
                    )
                    for row in case
                ),
            )


SECTIONS: list[Callable[[Page], None]] = [summary, tables]
