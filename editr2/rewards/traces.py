"""Traces: what a verifier writes about an edit, and principles, what it is asked about.

A principle is a question that is answered by yes (1) or no (0) and where yes is good. A trace is
reasoning in words, then an object of JSON with a verdict for each principle by its number, then the
score of the whole between tags, from 0 to 10:

    The cup is red now, and its handle is gone. ...
    {"1": 1, "2": 0}
    <score>4.5</score>

The score is read by rule and is the reward (Edit-R1, arXiv 2604.27505); a trace that does not have
all of this has no score, and none is made up for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from editr2.rewards.reading import Unread, json_in, last_tag, numbers, quoted

Kind = Literal["follow", "keep", "quality"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Of principles: is what was asked for there, is the rest kept, does it look right."""

HIGH = 10
SCALE = numbers(0, HIGH)
MOST_PRINCIPLES = 64


@dataclass(frozen=True)
class Principle:
    """A question and its kind (`KINDS`)."""

    text: str
    kind: Kind

    def written(self) -> dict[str, str]:
        """As files have it; `read_principles` reads a list of these."""
        return {"text": self.text, "kind": self.kind}


@dataclass(frozen=True)
class Trace:
    """What was read of a verifier's answer.

    verdicts: 0 or 1 for each principle, in order. score: of the whole, in [0, 1], a tenth of what
    was written.
    """

    verdicts: tuple[int, ...]
    score: float

    def share(self, principles: Sequence[Principle], kind: Kind) -> float | None:
        """Of the principles of a kind, how many hold; None where there are none of it."""
        said = [v for v, one in zip(self.verdicts, principles, strict=True) if one.kind == kind]
        return math.fsum(said) / len(said) if said else None


def read_trace(text: str, count: int) -> Trace:
    """A trace about `count` principles. Raises `Unread`, which quotes what is not there or wrong:
    a missing verdict, one too many, one that is neither 0 nor 1, no score, one out of range."""
    found = json_in(text)
    wanted = [str(n) for n in range(1, count + 1)]
    if set(found) != set(wanted):
        raise Unread(f"verdicts for {quoted(', '.join(found))} (accepted: 1 to {count})")
    verdicts = []
    for number in wanted:
        given = found[number]
        if given not in (0, 1):  # true and 1.0 are as good
            raise Unread(f"verdict {number}: {quoted(given)} came back (accepted: 0 or 1)")
        verdicts.append(int(given))
    try:
        score = SCALE.worth(last_tag(text, "score"))
    except Unread as unread:
        raise Unread(f"score: {unread}") from None
    return Trace(tuple(verdicts), score)


def write_trace(reasoning: str, verdicts: Sequence[int], score: float) -> str:
    """The text of a trace, which `read_trace` reads. reasoning: may be empty. score: in [0, 1]."""
    said = ", ".join(f'"{n}": {v}' for n, v in enumerate(verdicts, 1))
    parts = (reasoning, f"{{{said}}}", f"<score>{HIGH * score:.4g}</score>")
    return "\n".join(part for part in parts if part)


def read_principles(given: Any) -> tuple[Principle, ...]:
    """A list of objects with `text` and `kind`, as files and judges have them. Raises ValueError
    that says which entry is wrong, what it is and what is accepted."""
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_PRINCIPLES:
        what = f"a list of {len(given)}" if isinstance(given, list) else quoted(given)
        raise ValueError(f"principles: {what} (accepted: a list of 1 to {MOST_PRINCIPLES} objects)")
    found = []
    for place, one in enumerate(given):
        at = f"principles[{place}]"
        if not isinstance(one, dict) or set(one) != {"text", "kind"}:
            raise ValueError(f"{at}: {quoted(one)} (accepted: an object with text and kind)")
        text, kind = one["text"], one["kind"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{at}.text: {quoted(text)} (accepted: a non-empty string)")
        if kind not in KINDS:
            raise ValueError(f"{at}.kind: {quoted(kind)} (accepted: {', '.join(KINDS)})")
        found.append(Principle(" ".join(text.split()), kind))
    return tuple(found)


def numbered(principles: Sequence[Principle]) -> str:
    """As a prompt has them: a line each."""
    return "\n".join(f"{n}. {one.text}" for n, one in enumerate(principles, 1))
