"""`reproduction.md` and its plots, from the rows alone. Every number and every verdict is computed
here."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from editr2.errors import ConfigError
from editr2.reproduce.arms import ARMS, TURNS, Settings
from editr2.reproduce.claims import CLAIMS, Finding, find
from editr2.reproduce.intervals import COVERAGE, RESAMPLES, Interval, interval
from editr2.reproduce.plots import Difference, Series, forest, lines_by_turn
from editr2.reproduce.rows import FILE, Result, read_rows, results, shared_settings

NOTES = "reproduction_notes.md"
PAGE = "reproduction.md"
GA_PLOT, FOREST_PLOT = "reproduction_ga.svg", "reproduction_differences.svg"

SUMMARY = {
    "reproduces": ("reproduces", "reproduce"),
    "does not show": ("does not show", "do not show"),
    "reversed": ("is reversed", "are reversed"),
}

_PANELS = (
    (
        "Edit-R2, step by step",
        ("base", "base-intent", "single-turn", "multi-turn", "intent", "edit-r2"),
    ),
    (
        "MT-EditFlow",
        ("base", "mt-per-turn", "mt-reward-fusion", "mt-editflow-grpo", "mt-editflow-nft"),
    ),
)


def write_page(docs: Path) -> Path:
    """Writes the page and its plots into `docs` from its rows and its notes."""
    rows = read_rows(docs)
    if not rows:
        raise ConfigError(
            f"{docs / FILE}: no rows (accepted: those that `editr2 reproduce` writes)"
        )
    settings = shared_settings(rows, docs / FILE)
    found = results(rows)
    findings = [find(claim, found) for claim in CLAIMS]
    notes = docs / NOTES
    if not notes.exists():
        notes.write_text("")
    panels = _panels(found)
    drawn = {GA_PLOT: lines_by_turn(panels, "GA")} if panels else {}
    if differences := _differences(findings):
        drawn[FOREST_PLOT] = forest(differences, f"difference, turn {TURNS}")
    for name in (GA_PLOT, FOREST_PLOT):
        (docs / name).unlink(missing_ok=True)
        if name in drawn:
            (docs / name).write_text(drawn[name])
    text = _page(settings, found, findings, notes.read_text().strip(), list(drawn))
    (docs / PAGE).write_text(text)
    return docs / PAGE


def _page(
    settings: Settings,
    found: Sequence[Result],
    findings: Sequence[Finding],
    notes: str,
    plots: Sequence[str],
) -> str:
    picture = {
        GA_PLOT: f"![GA by turn, every arm]({GA_PLOT})",
        FOREST_PLOT: f"![Differences between arms with intervals]({FOREST_PLOT})",
    }
    parts = [
        "# Reproduction on the shapes world",
        _wrapped(
            f"Written by `editr2 reproduce` from [{FILE}]({FILE}); edit [{NOTES}]({NOTES}), not "
            f"this page."
        ),
        _summary(findings),
        _circumstances(settings, found),
        *([picture[GA_PLOT]] if GA_PLOT in plots else []),
        "## Orderings",
        _orderings(findings),
        *([picture[FOREST_PLOT]] if FOREST_PLOT in plots else []),
        "## What we learnt",
        *([notes] if notes else []),
        "## Scores",
        *_tables(found),
        "## The intervals",
        _about_intervals(found, settings),
        "## The arms",
        _arms(found),
    ]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------ wording


def _number(value: float, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.3f}".replace("-", "−")


def _cell(i: Interval | None, sign: bool = False) -> str:
    return (
        "–"
        if i is None
        else f"{_number(i.mean, sign)} [{_number(i.low, sign)}, {_number(i.high, sign)}]"
    )


def _title(result: Result, found: Sequence[Result]) -> str:
    """An arm's title, with its sampler where arms were evaluated under several."""
    several = len({r.sampler for r in found}) > 1
    return f"{result.arm.title} (ODE)" if several and result.sampler == "ode" else result.arm.title


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _range(values: Sequence[str]) -> str:
    low, high = min(values), max(values)
    return low if low == high else f"{low} to {high}"


def _circumstances(settings: Settings, found: Sequence[Result]) -> str:
    trained = [r for r in found if r.arm.trained]
    seeds = sorted({s for r in trained for s in r.seeds if s is not None})
    everything = [row for r in found for row in r.rows]
    hours = sum(row["seconds"] or 0 for row in everything) / 3600
    cores = _range([str(row["machine"]["cores"]) for row in everything])
    threads = sorted({row["machine"]["threads"] for row in everything if row["machine"]["threads"]})
    devices = sorted({row["machine"]["device"] for row in everything if row["machine"]["device"]})
    runs = sum(len(r.seeds) for r in trained)
    options = {
        "seeds": len(seeds),
        "iterations": settings.iterations,
        "sessions": settings.sessions,
        "groups": settings.groups,
        "siblings": settings.siblings,
        "sampler": settings.sampler,
    }
    command = "editr2 reproduce " + " ".join(f"--{name} {value}" for name, value in options.items())
    absent = [arm for arm in ARMS if not any(r.arm is arm for r in found)]
    if absent:
        command += " --arms " + ",".join(arm.name for arm in ARMS if arm not in absent)
    command = f"- `{command}`"
    lines = [
        f"- **{len(trained)} trained arms, {len(seeds)} training seed{'s' * (len(seeds) != 1)}**, "
        f"{runs} runs of {settings.iterations} iterations; "
        f"{settings.groups * settings.siblings * TURNS} edits an iteration in every arm "
        f"({settings.groups} sessions × {settings.siblings} siblings × {TURNS} turns).",
        f"- **{settings.sessions} held-out sessions** of {TURNS} turns, half of them `cm` (a "
        f"standing rule), half `cu` "
        "(pronouns): the same sessions and seeds for every arm, before and after.",
        f"- {_range([row['date'] for row in everything])}, editr2 "
        f"{_range([row['version'] for row in everything])}; {cores} cores{_of(threads, devices)}. "
        f"{hours:.1f} hours of training in all, summed over runs.",
        command,
    ]
    missing = [
        f"{_title(r, found)} {sorted(set(seeds) - set(r.seeds))}"
        for r in trained
        if set(r.seeds) != set(seeds)
    ]
    if missing:
        lines.append(f"- **Incomplete**: without the seeds {'; '.join(missing)}.")
    if absent:
        lines.append(f"- **Not run**: {', '.join(arm.title for arm in absent)}.")
    return "\n".join(line if line == command else _wrapped(line, "  ") for line in lines)


def _summary(findings: Sequence[Finding]) -> str:
    verdicts = [
        f.verdict
        for f in findings
        if f.claim.ordered and not f.claim.least and f.difference is not None
    ]
    counts = ", ".join(
        f"{n} {words[n != 1]}" for v, words in SUMMARY.items() if (n := verdicts.count(v))
    )
    text = f"Of {len(verdicts)} orderings that the papers state and that were run, {counts}."
    for f in findings:
        if f.claim.least and f.difference is not None:
            text += f" {f.claim.text}: {f.verdict}, {_cell(f.difference, sign=True)}."
    return _wrapped(text)


def _of(threads: Sequence[int], devices: Sequence[str]) -> str:
    text = f", threads a run: {'/'.join(map(str, threads))}" if threads else ""
    return text + (f", on {'/'.join(devices)}" if devices else "")


# ------------------------------------------------------------------------------------------- tables


def _orderings(findings: Sequence[Finding]) -> str:
    lines = []
    for f in findings:
        claim, i = f.claim, f.difference
        metric = {"marginal": "marginal success"}.get(claim.metric, claim.metric)
        where = f"{metric}, turn {claim.turn}" + (f", {claim.mode}" if claim.mode else "")
        seeds = (
            "–"
            if i is None or f.seeds == (None,)
            else " ".join(_number(v, sign=True) for v in i.by_seed)
        )
        what = f"`{claim.above}` − `{claim.below}`" + (" (gains)" if f.gains else "")
        lines.append(
            [claim.text, claim.source, what, where, _cell(i, sign=True), seeds, f"**{f.verdict}**"]
        )
    head = ["ordering", "from", "difference", "on", "mean [95 % interval]", "by seed", "verdict"]
    text = (
        "Differences are paired by session and seed. *Reproduces*: the whole interval lies above "
        "0; *reversed*: below it; *does not show*: it holds 0. Where no source gives an ordering, "
        "the verdict only says which is higher. "
        f"Each interval stands alone: of {len(findings)} such, one in twenty would miss its value "
        f"by chance."
    )
    if any(f.gains for f in findings):
        text += (
            " *Gains*: the two arms are sampled differently (ODE against a window of noise), so "
            "each is taken as its difference from the start under its own sampler."
        )
    return _table(head, lines) + "\n\n" + _wrapped(text)


def _tables(found: Sequence[Result]) -> list[str]:
    turns = range(1, TURNS + 1)
    names = {
        "IF": "IF, the instruction of this turn followed",
        "CC": "CC, what no instruction named is kept",
        "GA": "GA, everything right so far",
        "marginal": "Marginal success, this turn's instruction fully followed (IF = 1), whatever "
        "came before",
    }

    def score(metric: str, turn: int = TURNS, mode: str | None = None) -> Callable[[Result], str]:
        return lambda r: _cell(interval(r.values(metric, turn, mode)))

    def table(head: Sequence[str], cells: Sequence[Callable[[Result], str]]) -> str:
        return _table(
            ["arm", *head], [[_title(r, found), *(cell(r) for cell in cells)] for r in found]
        )

    out = [
        table(
            ["session success", "turn-3 GA by seed", "seeds", "minutes of training"],
            [
                score("success"),
                _by_seed,
                lambda r: str(len(r.seeds)) if r.arm.trained else "–",
                _minutes,
            ],
        ),
        _wrapped(
            "A session succeeds when GA at its last turn is 1; GA is 0 or 1 in this world, so "
            "this is also GA there. Minutes are wall time of training alone, the mean over seeds."
        ),
    ]
    for metric, name in names.items():
        out += [
            f"### {name}",
            table([f"turn {t}" for t in turns], [score(metric, t) for t in turns]),
        ]
    modes = sorted({str(m) for r in found for m in r.modes})
    out += [
        "### Session success by mode",
        table(modes, [score("GA", TURNS, mode) for mode in modes]),
    ]
    return out


def _by_seed(result: Result) -> str:
    i = interval(result.values("GA"))
    return "–" if i is None else " ".join(_number(v) for v in i.by_seed)


def _minutes(result: Result) -> str:
    seconds = [row["seconds"] for row in result.rows if row["seconds"] is not None]
    return f"{sum(seconds) / len(seconds) / 60:.1f}" if seconds else "–"


def _about_intervals(found: Sequence[Result], settings: Settings) -> str:
    seeds = max(len(r.seeds) for r in found)
    text = (
        f"Two things could have been others: the training seed and the {settings.sessions} "
        f"held-out sessions. Each of {RESAMPLES} bootstrap resamples (fixed seed) draws seeds "
        f"with replacement, draws sessions with replacement "
        "once for all seeds and arms, and takes the mean over the drawn seeds of the mean over "
        "the drawn sessions; the interval is from the 2.5th to the 97.5th percentile. A "
        "difference of two arms is resampled as the difference of the same session under the same "
        "seed. The start has no training seed: its interval is over sessions alone."
    )
    if seeds == 1:
        return _wrapped(
            text + " **There is one seed: all intervals are over sessions alone and say nothing "
            "of other seeds.**"
        )
    held = ", ".join(f"{100 * covered:.0f} %" for covered in COVERAGE.values())
    spread = ", ".join(f"{deviation:g}" for deviation in COVERAGE)
    return _wrapped(
        text + " A few seeds do not show the spread of all seeds: of simulated differences "
        "between two arms of three seeds "
        f"each, {held} were inside their interval where the seeds of an arm had a standard "
        f"deviation of {spread}, in "
        "this order. Hence the column of single seeds."
    )


def _arms(found: Sequence[Result]) -> str:
    def settings_of(r: Result) -> str:
        row = r.rows[0]
        changed = [
            f"`{section}.{name} = {str(value).lower() if isinstance(value, bool) else value}`"
            for section, values in row["overrides"].items()
            for name, value in values.items()
        ]
        return ", ".join([f"preset `{row['preset']}`", *changed])

    lines = [
        [
            f"`{r.arm.name}`",
            _title(r, found),
            r.arm.isolates,
            f"`{r.arm.beside}`" if r.arm.beside else "–",
            settings_of(r),
        ]
        for r in found
    ]
    table = _table(["name", "arm", "what it is", "differs only in this from", "settings"], lines)
    common = (
        "All arms train without a distance to the start (`train.kl_weight = 0`, also where the "
        "preset has one) and in the default sizes but for those above. NFT samples by ODE, each "
        "sibling from its own initial noise."
    )
    return f"{table}\n\n{_wrapped(common)}"


# -------------------------------------------------------------------------------------------- plots


def _panels(found: Sequence[Result]) -> list[tuple[str, list[Series]]]:
    panels = []
    for title, names in _PANELS:
        series = []
        for colour, name in enumerate(names):
            # The start may stand in several rows; the plot takes the one sampled as most arms are.
            of = sorted((r for r in found if r.arm.name == name), key=lambda r: r.sampler == "ode")
            if not of:
                continue
            turns = [interval(of[0].values("GA", t)) for t in range(1, TURNS + 1)]
            present = [i for i in turns if i is not None]
            if len(present) == TURNS:
                series.append(
                    Series(
                        _title(of[0], found),
                        present,
                        (colour + 5) % 6,
                        dashed=not of[0].arm.trained,
                    )
                )
        if any(not s.dashed for s in series):  # the start alone compares nothing
            panels.append((title, series))
    return panels


def _differences(findings: Sequence[Finding]) -> list[Difference]:
    return [
        Difference(f.claim.text, f.difference, f.verdict, f.claim.least)
        for f in findings
        if f.difference is not None
    ]
