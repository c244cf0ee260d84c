"""What rewards by one judge behind a server have in common: its prompts, its asker, and what they
say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from editr2.rewards.ask import Asker
from editr2.rewards.base import Calls, Item, Score
from editr2.rewards.client import Client
from editr2.rewards.record import Record
from editr2.rewards.wording import Place, prompts_of


class Served:
    """A reward is a class of this that answers `turn`.

    FOLDER: of its prompts. PLACES: of those in a checkout. HIGH: of the judge's scale. PROBED: what
    `probe` asks of the server. options: its scores are `options.scores`, where there is a choice.
    asker: in place of the one that the options name.
    """

    by_turn = True
    concurrency = 16
    batch = 1

    FOLDER: ClassVar[str]
    PLACES: ClassVar[Mapping[str, Place]]
    HIGH: ClassVar[int]
    PROBED: ClassVar[Mapping[str, bool]] = {"votes": True}
    VERSION: ClassVar[str] = "1"

    def __init__(
        self,
        options: Any,
        calls: Calls | None = None,
        record: Record | None = None,
        *,
        asker: Asker | None = None,
    ) -> None:
        self.options = options
        self.names: tuple[str, ...] = tuple(getattr(options, "scores", ("score",)))
        self.prompts = prompts_of(self.FOLDER, options.prompts, places=self.PLACES)
        self.asker = asker or Asker(Client(options, calls, record), options)

    @property
    def version(self) -> str:
        """Changes with the words and the judge."""
        return f"{self.VERSION} {self.prompts.digest} {self.options.model or ''}"

    @property
    def facts(self) -> dict[str, str]:
        facts = {**self.asker.facts, **self.prompts.facts, "scale": self.scale}
        released = getattr(self.options, "released", None)  # not all have a choice
        if released is not None:
            facts["rules"] = "as released" if released else "mended"
        return facts

    @property
    def scale(self) -> str:
        """What a score is of what the judge says."""
        return f"0 to {self.HIGH}, over it"

    def probe(self) -> list[str]:
        return self.asker.probe(images=2, **self.PROBED)

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        return [[self.turn(item, turn) for turn in item.asked] for item in items]

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        """A score for each name."""
        raise NotImplementedError
