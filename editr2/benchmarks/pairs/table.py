"""What a set of labelled comparisons is, for the table in `editr2.benchmarks.rewards`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from editr2.benchmarks.pairs.accuracy import Accuracy, Measure
from editr2.benchmarks.pairs.labelled import Comparison, Labelled
from editr2.benchmarks.table import Source
from editr2.judge.text import Table


@dataclass(frozen=True)
class PairSet:
    """An entry of the table.

    title: as its paper has it. read: the set; raises `DataError` with file and line. measured: its
    numbers, None of those that have no pair. shown_as: tables of them, by key. headline: keys of
    them. stretched: outputs of another size than their source are brought to it (as EditScore's
    evaluator does), else shown to the reward as they are. scores: of a dimension, the names of a
    reward's score that is meant for it. about: one line on source and licence.
    """

    title: str
    read: Callable[[Source], Labelled]
    measured: Callable[[Accuracy], Iterable[Measure | None]]
    shown_as: Callable[[Mapping[str, Measure]], Iterable[Table]]
    headline: Sequence[str]
    stretched: bool
    scores: Mapping[str, Sequence[str]] = field(default_factory=dict)
    about: str = ""

    def score(self, overall: str, names: Sequence[str], comparison: Comparison) -> str:
        """The score that a comparison is judged by: of its dimension, if the reward has one, else
        the one that stands for all."""
        dimension = comparison.groups.get("dimension", "overall")
        if dimension == "overall":
            return overall
        meant = self.scores.get(dimension, ())
        return next((name for name in meant if name in names), overall)
