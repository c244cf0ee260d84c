"""What an answer may be, and what number in [0, 1] it is: from its text, or from the probabilities
of its first word.

Whatever cannot be read, or is out of range, raises `Unread`, which quotes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editr2.errors import plain
from editr2.rewards.messages import Place

UNDECIDED = 0.1
"""More than this share on a digit that may begin a longer number fails (see `_by_number`)."""

_QUOTES = "\"'`*_ \t\r\n“”‘’"

_MARKS = "\"'`*_.,:;!?()[]{}<>#=/\\|“”‘’"


class Unread(Exception):
    """An answer that does not say what was asked for. The message quotes it."""


@dataclass(frozen=True)
class Scale:
    """What an answer may be, and what number in [0, 1] it is.

    what: in words. labels: the answers, lowest first, and what each is worth; none where any number
    from low to high is. low, high: of numbers, None of words. whole: whether numbers are integers.
    direct, think: what a prompt is told at its end, in each mode. question: for systemone.
    """

    what: str
    labels: Mapping[str, float]
    direct: str = ""
    think: str = ""
    question: Mapping[str, Any] | None = None
    low: int | None = None
    high: int | None = None
    whole: bool = False

    def worth(self, given: object) -> float:
        """The number of an answer: a text, or a value of JSON. Raises `Unread`."""
        if self.low is None or self.high is None:
            return self._word(given)
        number = _number(given, self.high) if isinstance(given, str) else given
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise Unread(f"{quoted(given)} came back (accepted: {self.what})")
        if not self.low <= number <= self.high:  # not so for NaN
            raise Unread(f"{quoted(given)} is out of range (accepted: {self.what})")
        if self.whole and number != int(number):
            raise Unread(f"{quoted(given)} is no whole number (accepted: {self.what})")
        return (number - self.low) / (self.high - self.low)

    def _word(self, given: object) -> float:
        if isinstance(given, bool | int) and given in (0, 1) and "yes" in self.labels:
            return float(given)
        if isinstance(given, str):
            text = given.strip().strip(_MARKS + " \n").casefold()
            first = re.match(r"[^\W_]+", text)
            word = first[0] if first else ""
            # A letter is a word by itself ("A dog ..."): of those, only one that stands alone.
            alone = len(word) > 1 or re.fullmatch(rf"{re.escape(word)}(\s*[.):].*)?", text, re.S)
            if word in self.labels and alone and not _either(text, word, self.labels):
                return self.labels[word]
        raise Unread(f"{quoted(given)} came back (accepted: {self.what})")

    @property
    def schema(self) -> dict[str, Any]:
        if self.low is None:
            return {"type": "string", "enum": list(self.labels)}
        kind = "integer" if self.whole else "number"
        return {"type": kind, "minimum": self.low, "maximum": self.high}


_LAST = (
    "Think it through in a few sentences. Then write the verdict as the last thing, between tags: "
)

YES_NO = Scale(
    "yes or no",
    {"no": 0.0, "yes": 1.0},
    "Answer with one word, yes or no.",
    f"{_LAST}<answer>yes</answer> or <answer>no</answer>.",
    {"type": "noul"},
)


def numbers(low: int, high: int, *, whole: bool = False) -> Scale:
    """Numbers from low to high, whole ones or any. Raises ValueError for a range that is none."""
    if not 0 <= low < high <= 100:
        raise ValueError(f"numbers: {low} to {high} (accepted: a range within 0 to 100)")
    values = range(low, high + 1)
    levels = {"type": "score", "criteria": [str(k) for k in values]}
    return Scale(
        f"{'a whole number' if whole else 'a number'} from {low} to {high}",
        {str(k): (k - low) / (high - low) for k in values},
        f"Answer with one whole number from {low} to {high} and nothing else.",
        f"{_LAST}<answer>N</answer>, where N is a whole number from {low} to {high}.",
        levels if len(values) <= 26 else None,
        low,
        high,
        whole,
    )


def graded(levels: Sequence[str]) -> Scale:
    """Descriptions, worst first, of which a letter names one; A is worth 0, the last one 1."""
    if not 2 <= len(levels) <= 26:
        raise ValueError(f"levels: {len(levels)} (accepted: 2 to 26)")
    letters = [chr(ord("A") + k) for k in range(len(levels))]
    listed = "\n".join(f"{letter}. {level}" for letter, level in zip(letters, levels))
    span = f"A to {letters[-1]}"
    return Scale(
        f"a letter, {span}",
        {letter.casefold(): k / (len(levels) - 1) for k, letter in enumerate(letters)},
        f"{listed}\nAnswer with the letter that fits best ({span}) and nothing else.",
        f"{listed}\n{_LAST}<answer>A</answer>, with the letter that fits best ({span}).",
        {"type": "score", "criteria": list(levels)},
    )


Fields = Mapping[str, "Scale | Sequence[Scale]"]
"""Of a JSON verdict: name -> a scale, or a list of so many values in order."""

Read = Callable[[str], Mapping[str, float | None]]
"""A vote's text to values in [0, 1] by name; None where one does not apply. Raises `Unread`."""


def quoted(given: object) -> str:
    text = given if isinstance(given, str) else json.dumps(given, default=str)
    text = plain(text)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def answer_part(text: str) -> str:
    """Without what a model that reasons wrote before its answer."""
    return text.rpartition("</think>")[2].strip()


def last_tag(text: str, tag: str) -> str:
    """What stands between the last `<tag>` and its `</tag>`. Raises `Unread` where there is no such
    pair."""
    text = answer_part(text)
    found = re.findall(
        rf"<{re.escape(tag)}>((?:(?!<{re.escape(tag)}>).)*?)</{re.escape(tag)}>", text, re.S | re.I
    )
    if not found:
        raise Unread(f"no <{tag}> came back, but {quoted(text[-57:])}")
    return str(found[-1]).strip()


def json_in(text: str) -> dict[str, Any]:
    """The last object of JSON in a text, with fences or prose around it. Raises `Unread` where
    there is none; one with NaN or an infinity is none."""
    text, found, at = answer_part(text), None, 0
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    while (at := text.find("{", at)) >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found, at = value, end
        except (ValueError, RecursionError):
            at += 1
    if not isinstance(found, dict):
        raise Unread(f"no JSON object came back, but {quoted(text[:57])}")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _either(text: str, word: str, labels: Mapping[str, float]) -> bool:
    """Whether a text that begins with a label names another one as well and says no more: `yes or
    no`, `no/yes`. `Yes, no dog is there` says more."""
    words = re.findall(r"[^\W_]+", text)
    others = set(labels) - {word}
    if words[1:2] == ["or"] and words[2:3] and words[2] in others:
        return True
    return bool(others & set(words)) and set(words) <= {*labels, "and", "or"}


def _number(text: str, high: int) -> float | None:
    """The one number of a text; of `4/5` and `4 out of 5` the first. Words stand before it or
    behind it, unless a colon or the like leads to it: in `of the 2 images none` it is no verdict.
    """
    text = re.sub(rf"(?<=\d)\s*(/|out of)\s*{high}(\.0+)?(?![\d.]*\d)", "", text, flags=re.I)
    found = list(re.finditer(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\.?\d)(?![^\W\d_])", text))
    if len(found) != 1 or re.search(r"\d[eE][-+]?\d", text):  # 1e-1 is not read
        return None
    before, behind = text[: found[0].start()].rstrip(_QUOTES), text[found[0].end() :]
    stands = not re.search(r"\w", before) or not re.search(r"\w", behind)
    led = re.search(r"([:=]|\bis)$", before, re.I)
    return float(found[0][0]) if stands or led else None


def tags_of(tags: Mapping[str, Scale]) -> Read:
    return lambda text: {tag: scale.worth(last_tag(text, tag)) for tag, scale in tags.items()}


def objects_of(fields: Fields) -> Read:
    def read(text: str) -> dict[str, float | None]:
        found = json_in(text)
        values: dict[str, float | None] = {}
        for name, scales in fields.items():
            if name not in found:
                there = ", ".join(map(str, found)) or "none"
                raise Unread(f"no {name!r} in the JSON (there were: {quoted(there)})")
            given = found[name]
            if isinstance(scales, Scale):
                values[name] = _field(name, scales, given)
                continue
            if not isinstance(given, list) or len(given) != len(scales):
                raise Unread(
                    f"{name} is {quoted(given)} (accepted: a list of {len(scales)}, each "
                    f"{scales[0].what})"
                )
            for k, (scale, one) in enumerate(zip(scales, given)):
                values[f"{name}[{k}]"] = _field(f"{name}[{k}]", scale, one)
        return values

    return read


def _field(name: str, scale: Scale, given: object) -> float:
    try:
        return scale.worth(given)
    except Unread as unread:
        raise Unread(f"{name}: {unread}") from None


def names_of(fields: Fields) -> list[str]:
    return [
        one
        for name, scales in fields.items()
        for one in (
            [name] if isinstance(scales, Scale) else [f"{name}[{k}]" for k in range(len(scales))]
        )
    ]


def schema_of(fields: Fields, reason: str | None) -> dict[str, Any]:
    properties: dict[str, Any] = {} if reason is None else {reason: {"type": "string"}}
    for name, scales in fields.items():
        if isinstance(scales, Scale):
            properties[name] = scales.schema
        else:
            count = len(scales)
            properties[name] = {
                "type": "array",
                "items": scales[0].schema,
                "minItems": count,
                "maxItems": count,
            }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def first_word(places: Sequence[Place], scale: Scale) -> tuple[dict[str, float], float]:
    """The probability of every label at the first word of an answer, and their sum, what was seen.

    Tokens count by their text: case, blanks before it and marks around it do not matter. Raises
    `Unread` for an answer without a word, and for a number out of range.
    """
    for at, place in enumerate(places):
        if _word(place.token):
            by = _by_number if scale.low is not None else _by_label
            masses = by(places[at:], scale)
            return masses, math.fsum(masses.values())
    raise Unread(f"no word came back (accepted: {scale.what})")


def _word(token: str) -> str:
    # Some servers show the blank before a word as the tokenizer does.
    return token.replace("▁", " ").replace("Ġ", " ").strip(_MARKS + " \t\n\r").casefold()


def _by_label(places: Sequence[Place], scale: Scale) -> dict[str, float]:
    masses = dict.fromkeys(scale.labels, 0.0)
    for text, log_prob in places[0].top:
        if (word := _word(text)) in masses:
            masses[word] += math.exp(log_prob)
    return masses


def _by_number(places: Sequence[Place], scale: Scale) -> dict[str, float]:
    """Of numbers, which may be written in two tokens.

    What follows a token is known of the chosen one alone. So a digit that was chosen and may begin
    a longer number is shared out by the next token's probabilities; one that was not chosen counts
    as it stands where longer numbers are tokens of their own, and is left out otherwise: then a
    share above `UNDECIDED` fails.
    """
    masses = dict.fromkeys(scale.labels, 0.0)
    top = [(_word(text), math.exp(log_prob)) for text, log_prob in places[0].top]
    chosen = written = _word(places[0].token)
    for place in places[1:]:
        if not (written.isdigit() and place.token.isdigit()):
            break
        written += place.token
    if written.isdigit() and written not in masses:
        raise Unread(f"{written!r} is out of range (accepted: {scale.what})")
    merged = any(len(word) > 1 and word in masses for word, _ in top)
    undecided = 0.0
    for word, p in top:
        longer = _begins(word, masses)
        if not longer:
            if word in masses:
                masses[word] += p
        elif word == chosen:
            follow = places[1].top if len(places) > 1 else ()
            rest = p
            for text, log_prob in follow:
                digits = text.strip() if text == text.strip() and text.isdigit() else ""
                if digits:
                    share = p * math.exp(log_prob)
                    rest -= share
                    if word + digits in masses:
                        masses[word + digits] += share
            if word in masses:
                masses[word] += max(rest, 0.0)
        elif word in masses and merged:
            masses[word] += p
        else:
            undecided += p
    if undecided > UNDECIDED:
        raise Unread(
            f"{undecided:.2f} of the probability is on digits that may begin a longer number "
            f"(accepted: at most {UNDECIDED:g}; ask for 0 to 9, or for levels)"
        )
    return masses


def _begins(word: str, labels: Mapping[str, float]) -> bool:
    """Whether a digit begins a longer label."""
    return word.isdigit() and any(label != word and label.startswith(word) for label in labels)
