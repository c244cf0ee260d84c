"""Everything that an evaluation says of one verifier, made of what it wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editr2.rewards.record import pixel_digest
from editr2.verifier import measures
from editr2.verifier.files import Edit, Preference, edits_of
from editr2.verifier.measures import Against, Agreement, Bin, Gain, Judged, JudgedPair, Measure
from editr2.verifier.tracing import Count
from editr2.verifier.writers import Said, told_of


@dataclass(frozen=True)
class Cost:
    """traces: that came back. tokens: of one, where they are known. characters: of one. seconds: of
    one, as it was waited for."""

    traces: int
    tokens: float | None
    characters: float
    seconds: float | None


@dataclass(frozen=True)
class Evaluation:
    """What a verifier is worth."""

    verifier: str
    pairs: Sequence[JudgedPair]
    edits: Sequence[Judged]
    count: Count
    cost: Cost
    preferences: Sequence[Measure]
    by_margin: Sequence[Bin]
    by_score: Sequence[Bin]
    against: Against | None
    auc: Measure | None
    agreement: Agreement | None
    gain: Gain | None = None

    def written(self) -> dict[str, Any]:
        """For JSON."""
        said: dict[str, Any] = {
            "verifier": self.verifier,
            "pairs": len(self.pairs),
            "pairs_judged": sum(not math.isnan(pair.difference) for pair in self.pairs),
            "edits_with_gold": len(self.edits),
            "edits_judged": sum(one.heard for one in self.edits),
            "traces": {
                "asked": self.count.asked,
                "read": self.count.read,
                "unread": dict(self.count.unread),
                "failed": dict(self.count.failed),
            },
            "cost": {
                name: _number(value) if isinstance(value, float) else value
                for name, value in vars(self.cost).items()
            },
        }
        if self.pairs:
            said["preference"] = _by_name(self.preferences)
            said["by_margin"] = measures.bins_written(self.by_margin)
            said["by_score"] = measures.bins_written(self.by_score)
        if self.gain is not None:
            said["gain"] = self.gain.written()
        if self.against is not None:
            said["verdicts"] = _by_name(self.against.accuracy)
            said["reliability"] = measures.bins_written(self.against.reliability)
            said["brier"] = _number(self.against.brier)
            said["calibration_error"] = _number(self.against.error)
        if self.auc is not None:
            said["auc"] = self.auc.written()
        if (one := self.agreement) is not None:
            said["agreement"] = {
                "verdicts": one.verdicts.written(),
                "kappa": _number(one.kappa),
                "spread": _number(one.spread),
                "settled": _number(one.settled),
            }
        return said

    @property
    def judged(self) -> list[str]:
        """How many of what there is are judged, in words."""
        pairs = sum(not math.isnan(pair.difference) for pair in self.pairs)
        edits = sum(one.heard for one in self.edits)
        return [
            f"{count} of {len(some)} {what}"
            for count, some, what in (
                (pairs, self.pairs, "pairs"),
                (edits, self.edits, "edits with gold"),
            )
            if some
        ]

    @property
    def everybody(self) -> list[Judged]:
        return [*(one for pair in self.pairs for one in (pair.win, pair.lose)), *self.edits]


def evaluation(
    name: str,
    pairs: Sequence[Preference],
    edits: Sequence[Edit],
    gold: Mapping[str, tuple[int, ...]],
    said: Sequence[Sequence[Said]],
    took: tuple[float, int],
) -> Evaluation:
    """said: of both outputs of every pair, then of every edit. took: seconds, and of how many
    answers."""
    asked, count, digests = [*edits_of(pairs), *edits], Count(), dict[Path, str]()
    judged = []
    for edit, row in zip(asked, said, strict=True):
        told = told_of(edit, row, name)
        count.add(row, told)
        if edit.image.path not in digests:
            digests[edit.image.path] = pixel_digest(edit.image.read())
        source = digests[edit.image.path]
        judged.append(Judged(edit, len(row), tuple(told), source, gold.get(edit.id)))
    both = [JudgedPair(pair, judged[2 * n], judged[2 * n + 1]) for n, pair in enumerate(pairs)]
    alone = judged[2 * len(pairs) :]
    return Evaluation(
        name,
        both,
        alone,
        count,
        _cost(said, took),
        measures.preferences(both) if both else [],
        measures.by_margin(both) if both else [],
        measures.by_score(both) if both else [],
        Against.of(alone) if alone else None,
        measures.auc(alone),
        measures.agreement(judged, both),
    )


def _cost(said: Sequence[Sequence[Said]], took: tuple[float, int]) -> Cost:
    texts = [one for row in said for one in row if one.text is not None]
    tokens = [one.tokens for one in texts if one.tokens is not None]
    seconds, answers = took
    return Cost(
        len(texts),
        sum(tokens) / len(tokens) if tokens else None,
        sum(len(one.text or "") for one in texts) / max(1, len(texts)),
        seconds / answers if answers else None,
    )


def _by_name(found: Sequence[Measure]) -> dict[str, Any]:
    return {one.name: one.written() for one in found}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
