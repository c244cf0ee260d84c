"""`reproduction.md` and its plots, from the rows alone. Every number and every verdict is computed
here."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from editr2.errors import ConfigError
from editr2.report.intervals import COVERAGE, RESAMPLES, Interval, interval
from editr2.reproduce.arms import BELIEVED, STUDIES, TURNS, Arm, Settings, start_of, study_of
from editr2.reproduce.claims import STUDY_CLAIMS, Finding, find
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

TITLES = {
    "methods": "Reproduction on the shapes world",
    "judges": "Rewarded by a verifier that errs, on the shapes world",
}

_PANELS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "methods": (
        (
            "Edit-R2, step by step",
            ("base", "base-intent", "single-turn", "multi-turn", "intent", "edit-r2"),
        ),
        (
            "MT-EditFlow",
            ("base", "mt-per-turn", "mt-reward-fusion", "mt-editflow-grpo", "mt-editflow-nft"),
        ),
    ),
    "judges": (
        ("The reward", ("base-intent", "exact", "gcpo", "sft", "early")),
        (
            "Under the shipped verifier",
            (
                "base-intent",
                "shipped",
                "direct",
                "shipped-broadcast",
                "shipped-fusion",
                "shipped-unfiltered",
            ),
        ),
        (
            "Credit, under direct verdicts",
            ("base-intent", "direct", "direct-broadcast", "direct-fusion", "direct-unfiltered"),
        ),
        (
            "Credit, under exact scores",
            ("base-intent", "exact", "exact-broadcast", "exact-fusion", "exact-unfiltered"),
        ),
    ),
}


def write_page(docs: Path) -> Path:
    """Writes the page and its plots into `docs` from its rows and its notes."""
    rows = read_rows(docs)
    if not rows:
        raise ConfigError(
            f"{docs / FILE}: no rows (accepted: those that `editr2 reproduce` writes)"
        )
    settings = shared_settings(rows, docs / FILE)
    found = results(rows)
    study = study_of(r.arm.name for r in found)
    if study is None:
        raise ConfigError(f"{docs / FILE}: holds rows of several studies (accepted: one a folder)")
    findings = [find(claim, found) for claim in STUDY_CLAIMS[study]]
    notes = docs / NOTES
    if not notes.exists():
        notes.write_text("")
    panels = _panels(found, study)
    drawn = {GA_PLOT: lines_by_turn(panels, "GA")} if panels else {}
    if differences := _differences(findings):
        drawn[FOREST_PLOT] = forest(differences, f"difference, turn {TURNS}")
    for name in (GA_PLOT, FOREST_PLOT):
        (docs / name).unlink(missing_ok=True)
        if name in drawn:
            (docs / name).write_text(drawn[name])
    text = _page(study, settings, found, findings, notes.read_text().strip(), list(drawn))
    (docs / PAGE).write_text(text)
    return docs / PAGE


def _page(
    study: str,
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
        f"# {TITLES[study]}",
        _wrapped(
            f"Written by `editr2 reproduce` from [{FILE}]({FILE}); edit [{NOTES}]({NOTES}), not "
            f"this page."
        ),
        _summary(findings),
        _circumstances(study, settings, found),
        *([picture[GA_PLOT]] if GA_PLOT in plots else []),
        "## Orderings",
        _orderings(findings),
        *([picture[FOREST_PLOT]] if FOREST_PLOT in plots else []),
        "## What we learnt",
        *([notes] if notes else []),
        "## Scores",
        *_tables(found),
        *_beliefs(found),
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
    if i is None:
        return "–"
    return f"{_number(i.mean, sign)} [{_number(i.low, sign)}, {_number(i.high, sign)}]"


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


def _circumstances(study: str, settings: Settings, found: Sequence[Result]) -> str:
    """How the rows came about, as a list."""
    trained = [r for r in found if r.arm.trained]
    seeds = sorted({s for r in trained for s in r.seeds if s is not None})
    absent = [arm for arm in STUDIES[study] if not any(r.arm is arm for r in found)]
    lines = [
        _training(settings, trained, len(seeds)),
        f"- **{settings.sessions} held-out sessions** of {TURNS} turns, half of them `cm` (a "
        f"standing rule), half `cu` (pronouns): the same sessions and seeds for every arm, before "
        "and after.",
        _machine(found),
    ]
    missing = [
        f"{_title(r, found)} {sorted(set(seeds) - set(r.seeds))}"
        for r in trained
        if set(r.seeds) != set(seeds)
    ]
    gaps = []
    if missing:
        gaps.append(f"- **Incomplete**: without the seeds {'; '.join(missing)}.")
    if absent:
        gaps.append(f"- **Not run**: {', '.join(arm.title for arm in absent)}.")
    command = f"- `{_command(study, settings, len(seeds), absent)}`"  # a command is not wrapped
    wrapped = [_wrapped(line, "  ") for line in lines]
    return "\n".join([*wrapped, command, *(_wrapped(line, "  ") for line in gaps)])


def _training(settings: Settings, trained: Sequence[Result], seeds: int) -> str:
    runs = sum(len(r.seeds) for r in trained)
    edits = settings.groups * settings.siblings * TURNS
    plural = "s" if seeds != 1 else ""
    return (
        f"- **{len(trained)} trained arms, {seeds} training seed{plural}**, {runs} runs of "
        f"{settings.iterations} iterations; {edits} edits an iteration in every arm "
        f"({settings.groups} sessions × {settings.siblings} siblings × {TURNS} turns)."
    )


def _machine(found: Sequence[Result]) -> str:
    """When, by which version, on what, and for how long."""
    rows = [row for r in found for row in r.rows]
    machines = [row["machine"] for row in rows]
    threads = sorted({machine["threads"] for machine in machines if machine["threads"]})
    devices = sorted({machine["device"] for machine in machines if machine["device"]})
    cores = _range([str(machine["cores"]) for machine in machines])
    hours = sum(row["seconds"] or 0 for row in rows) / 3600
    return (
        f"- {_range([row['date'] for row in rows])}, editr2 "
        f"{_range([row['version'] for row in rows])}; {cores} cores{_of(threads, devices)}. "
        f"{hours:.1f} hours of training in all, summed over runs."
    )


def _command(study: str, settings: Settings, seeds: int, absent: Sequence[Arm]) -> str:
    """What makes the same rows again."""
    options = {
        "seeds": seeds,
        "iterations": settings.iterations,
        "sessions": settings.sessions,
        "groups": settings.groups,
        "siblings": settings.siblings,
        "sampler": settings.sampler,
    }
    command = "editr2 reproduce "
    if study != "methods":
        command += f"--study {study} "
    if any(arm.needs_verifiers for arm in STUDIES[study] if arm not in absent):
        command += "--verifiers VERIFIERS "
    command += " ".join(f"--{name} {value}" for name, value in options.items())
    if absent:
        command += " --arms " + ",".join(arm.name for arm in STUDIES[study] if arm not in absent)
    return command


def _summary(findings: Sequence[Finding]) -> str:
    run = [f for f in findings if f.difference is not None]
    verdicts = [f.verdict for f in run if f.claim.ordered and not f.claim.least]
    counted = []
    for verdict, (one, many) in SUMMARY.items():
        count = verdicts.count(verdict)
        if count:
            counted.append(f"{count} {one if count == 1 else many}")
    counts = ", ".join(counted)
    text = f"Of {len(verdicts)} orderings that the papers state and that were run, {counts}."
    for f in run:
        if f.claim.least:
            text += f" {f.claim.text}: {f.verdict}, {_cell(f.difference, sign=True)}."
    return _wrapped(text)


def _of(threads: Sequence[int], devices: Sequence[str]) -> str:
    text = f", threads a run: {'/'.join(map(str, threads))}" if threads else ""
    return text + (f", on {'/'.join(devices)}" if devices else "")


# ------------------------------------------------------------------------------------------- tables


def _orderings(findings: Sequence[Finding]) -> str:
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
    return _table(head, [_ordering(f) for f in findings]) + "\n\n" + _wrapped(text)


def _ordering(finding: Finding) -> list[str]:
    """A row of the table of orderings."""
    claim, difference = finding.claim, finding.difference
    metric = {"marginal": "marginal success"}.get(claim.metric, claim.metric)
    seeds = "–"
    if difference is not None and finding.seeds != (None,):
        seeds = " ".join(_number(value, sign=True) for value in difference.by_seed)
    return [
        claim.text,
        claim.source,
        f"`{claim.above}` − `{claim.below}`" + (" (gains)" if finding.gains else ""),
        f"{metric}, turn {claim.turn}" + (f", {claim.mode}" if claim.mode else ""),
        _cell(difference, sign=True),
        seeds,
        f"**{finding.verdict}**",
    ]


METRICS = {
    "IF": "IF, the instruction of this turn followed",
    "CC": "CC, what no instruction named is kept",
    "GA": "GA, everything right so far",
    "marginal": "Marginal success, this turn's instruction fully followed (IF = 1), whatever "
    "came before",
}


def _tables(found: Sequence[Result]) -> list[str]:
    def score(metric: str, turn: int = TURNS, mode: str | None = None) -> Callable[[Result], str]:
        return lambda r: _cell(interval(r.values(metric, turn, mode)))

    def table(columns: dict[str, Callable[[Result], str]]) -> str:
        lines = [[_title(r, found), *(cell(r) for cell in columns.values())] for r in found]
        return _table(["arm", *columns], lines)

    out = [
        table(
            {
                "session success": score("success"),
                "turn-3 GA by seed": _by_seed,
                "seeds": lambda r: str(len(r.seeds)) if r.arm.trained else "–",
                "minutes of training": _minutes,
            }
        ),
        _wrapped(
            "A session succeeds when GA at its last turn is 1; GA is 0 or 1 in this world, so "
            "this is also GA there. Minutes are wall time of training alone, the mean over seeds."
        ),
    ]
    for metric, name in METRICS.items():
        by_turn = {f"turn {t}": score(metric, t) for t in range(1, TURNS + 1)}
        out += [f"### {name}", table(by_turn)]
    modes = sorted({str(mode) for r in found for mode in r.modes})
    by_mode = {mode: score("GA", TURNS, mode) for mode in modes}
    return [*out, "### Session success by mode", table(by_mode)]


def _beliefs(found: Sequence[Result]) -> list[str]:
    """What verifiers said of the editors that they rewarded, beside what the world says."""
    judged = [r for r in found if r.arm.judge is not None]
    if not judged:
        return []

    starts = {(r.arm.name, r.sampler): r.rows[0]["ga_turn"][-1] for r in found if not r.arm.trained}
    lines = []
    for r in judged:
        start = starts.get((start_of(r.arm), r.sampler))
        said = [row["judge"]["believed"] for row in r.rows]
        believed = [None if None in one.values() else one["after"] - one["before"] for one in said]
        true = [] if start is None else [row["ga_turn"][-1] - start for row in r.rows]
        cells = (
            " ".join("–" if v is None else _number(v, sign=True) for v in values)
            for values in (believed, true)
        )
        lines.append([_title(r, found), *(cell or "–" for cell in cells)])
    text = (
        f"The gain of a turn-{TURNS} GA, seed by seed: as the verifier that was the reward scores "
        f"the first {BELIEVED} held-out sessions (by its score of the whole, of which half is for "
        "what was kept, where the world has 0 or 1), and as the world scores all of them."
    )
    head = ["arm", "believed by its verifier", "exact"]
    return ["### What the verifiers believed", _table(head, lines), _wrapped(text)]


def _by_seed(result: Result) -> str:
    i = interval(result.values("GA"))
    return "–" if i is None else " ".join(_number(v) for v in i.by_seed)


def _minutes(result: Result) -> str:
    seconds = [row["seconds"] for row in result.rows if row["seconds"] is not None]
    return f"{sum(seconds) / len(seconds) / 60:.1f}" if seconds else "–"


def _about_intervals(found: Sequence[Result], settings: Settings) -> str:
    text = (
        f"Two things could have been others: the training seed and the {settings.sessions} "
        f"held-out sessions. Each of {RESAMPLES} bootstrap resamples (fixed seed) draws seeds "
        f"with replacement, draws sessions with replacement "
        "once for all seeds and arms, and takes the mean over the drawn seeds of the mean over "
        "the drawn sessions; the interval is from the 2.5th to the 97.5th percentile. A "
        "difference of two arms is resampled as the difference of the same session under the same "
        "seed. The start has no training seed: its interval is over sessions alone."
    )
    if max(len(r.seeds) for r in found) == 1:
        return _wrapped(
            text + " **There is one seed: all intervals are over sessions alone and say nothing "
            "of other seeds.**"
        )
    held = ", ".join(f"{100 * covered:.0f} %" for covered in COVERAGE.values())
    spread = ", ".join(f"{deviation:g}" for deviation in COVERAGE)
    return _wrapped(
        text + " A few seeds do not show the spread of all seeds: of simulated differences "
        f"between two arms of three seeds each, {held} were inside their interval where the seeds "
        f"of an arm had a standard deviation of {spread}, in this order. Hence the column of "
        "single seeds."
    )


def _arms(found: Sequence[Result]) -> str:
    head = ["name", "arm", "what it is", "differs only in this from", "settings"]
    lines = [
        [
            f"`{r.arm.name}`",
            _title(r, found),
            r.arm.isolates,
            f"`{r.arm.beside}`" if r.arm.beside else "–",
            _settings_of(r),
        ]
        for r in found
    ]
    common = (
        "All arms train without a distance to the start (`train.kl_weight = 0`, also where the "
        "preset has one) and in the default sizes but for those above. NFT samples by ODE, each "
        "sibling from its own initial noise."
    )
    return f"{_table(head, lines)}\n\n{_wrapped(common)}"


def _settings_of(result: Result) -> str:
    """The preset of an arm, and what it changes in it, as its row has them."""
    row = result.rows[0]
    said = [f"preset `{row['preset']}`"]
    for section, values in row["overrides"].items():
        for name, value in values.items():
            shown = str(value).lower() if isinstance(value, bool) else value
            said.append(f"`{section}.{name} = {shown}`")
    return ", ".join(said)


# -------------------------------------------------------------------------------------------- plots


def _panels(found: Sequence[Result], study: str) -> list[tuple[str, list[Series]]]:
    panels = []
    for title, names in _PANELS[study]:
        series = [_series(name, (colour + 5) % 6, found) for colour, name in enumerate(names)]
        present = [s for s in series if s is not None]
        if any(not s.dashed for s in present):  # the start alone compares nothing
            panels.append((title, present))
    return panels


def _series(name: str, colour: int, found: Sequence[Result]) -> Series | None:
    """GA by turn of one arm; None where it was not run, or has no score at a turn."""
    # The start may stand in several rows; the plot takes the one sampled as most arms are.
    samplers = [r.sampler for r in found if r.arm.trained]
    most = max(samplers, key=samplers.count, default="")
    results = sorted((r for r in found if r.arm.name == name), key=lambda r: r.sampler != most)
    if not results:
        return None
    first = results[0]
    turns = [interval(first.values("GA", t)) for t in range(1, TURNS + 1)]
    present = [i for i in turns if i is not None]
    if len(present) < TURNS:
        return None
    return Series(_title(first, found), present, colour, dashed=not first.arm.trained)


def _differences(findings: Sequence[Finding]) -> list[Difference]:
    return [
        Difference(f.claim.text, f.difference, f.verdict, f.claim.least)
        for f in findings
        if f.difference is not None
    ]
