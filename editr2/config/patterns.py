"""Regular expressions that a user gives: is it one, and can it be matched in the time that anyone
waits.

Python's engine tries the ways in which an expression can match one after the other, and `(a+)+b`
has 2^n of them on n letters: it would hang the program inside of C, where no exception ends it. So
the ways are counted beforehand, from the engine's own parse tree and for names of up to `LENGTH`
characters, and too many are refused. That needs no clock, no other process and no layer names: the
same answer on every machine, in every command, before any weights are loaded. The price is that
some expressions of many nested repeats are refused that would have matched quickly.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

sre_parse: Any = importlib.import_module(
    "re._parser" if hasattr(re, "_parser") else "sre_parse"
)  # the name since 3.11

LENGTH = 64
"""Characters of a layer's name that a repeat can share out; published transformers have names of up
to 60."""
DIGITS = 4
"""The same of digits in a row: numbers of blocks."""
MOST_WAYS = LENGTH**5
"""`.*` four times with choices between them is below this, and takes milliseconds a name."""


def pattern_problem(expression: str) -> str | None:
    """What is wrong with a regular expression over layer names, or None."""
    try:
        re.compile(expression)
        tree = sre_parse.parse(expression)
        ways = _of_sequence(tree)
    except (re.error, OverflowError) as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    if ways >= MOST_WAYS:
        return "this one repeats what repeats, so a name can be matched in too many ways to try"
    return None


def _of_sequence(tree: Sequence[tuple[Any, Any]]) -> int:
    ways = 1
    for what, of in tree:
        ways = min(MOST_WAYS, ways * _of_item(str(what), of))
    return ways


def _of_item(what: str, of: Any) -> int:
    """An upper bound on the ways in which an item of the engine's parse tree can match a name."""
    if what in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, body = of
        digits = str(list(body)) == "[(IN, [(CATEGORY, CATEGORY_DIGIT)])]"
        longest = min(int(most), DIGITS if digits else LENGTH)
        each = _of_sequence(body)
        lengths = max(1, longest - min(int(least), longest) + 1)
        return min(MOST_WAYS, lengths * each**longest)
    if what == "BRANCH":
        return sum(_of_sequence(branch) for branch in of[1])
    if what == "SUBPATTERN":
        return _of_sequence(of[-1])
    if what in ("ASSERT", "ASSERT_NOT"):
        return _of_sequence(of[1])
    if what == "ATOMIC_GROUP":
        return _of_sequence(of)
    if what == "GROUPREF_EXISTS":
        _, yes, no = of
        return _of_sequence(yes) + (_of_sequence(no) if no else 1)
    return 1
