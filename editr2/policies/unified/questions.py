"""What an intent is asked for with: a text for each mode of sessions, ours or a user's.

`cm` is asked where earlier turns set standing rules, `cu` where a pronoun stands for something, and
`rewrite` of any other session. `{history}` is what was said before, round by round, `{current}`
what is said now. `policy.questions` replaces the texts as `editr2.wording` has it: a folder or a
file with some of them, or a checkout of Edit-R2's release, whose own questions are read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from editr2.errors import ConfigError
from editr2.wording import ANSWER, Place, Prompts, prompts_of

FOLDER = Path(__file__).parent / "prompts"
OTHERS = "rewrite"
MODES = ("cm", "cu", OTHERS)

PLACES = {
    mode: Place(
        "flow_grpo/bagel/inferencer.py",
        function="_build_pe_question",
        parts=("history_text", "current_prompt.strip()"),
        nth=nth,
        fields={"{history_text}": "history", "{current_prompt.strip()}": "current"},
    )
    for nth, mode in enumerate(MODES)
}
"""Of github.com/yuxiaooye/Edit-R2 at 2dd266f3."""


@dataclass(frozen=True)
class Rounds:
    """How what was said before is written. line: of one instruction, with `{n}` and `{said}`."""

    line: str
    between: str

    def __call__(self, earlier: Sequence[str]) -> str:
        lines = (self.line.format(n=n, said=said) for n, said in enumerate(earlier, 1))
        return self.between.join(lines)


ROUNDS = {"bagel": Rounds("Round {n}: {said}", "\n"), "embedded": Rounds("{said} ; ", "")}
"""By the folder of `prompts/` that a policy is asked with."""


@dataclass(frozen=True)
class Wording:
    """The questions of a policy."""

    prompts: Prompts
    rounds: Rounds

    def __call__(self, earlier: Sequence[str], current: str, mode: str | None = None) -> str:
        """The question behind these raw instructions."""
        name = mode if mode in self.prompts.texts else OTHERS
        return self.prompts(str(name), history=self.rounds(earlier), current=current)[0]


def wording_of(kind: str, given: str | None) -> Wording:
    """kind: of `ROUNDS`. given: `policy.questions`. Raises `ConfigError`, naming what is wrong and
    what is accepted."""
    try:
        prompts = prompts_of(FOLDER / kind, given, places=PLACES)
    except ConfigError as error:
        raise ConfigError(f"policy.questions: {str(error).removeprefix('prompts: ')}") from None
    for mode, text in prompts.texts.items():
        if "{current}" not in text or ANSWER in text:
            raise ConfigError(
                f"policy.questions: {given}: {mode} (accepted: a text with {{current}}, and where "
                f"it wants them {{history}}, and no {ANSWER})"
            )
    return Wording(prompts, ROUNDS[kind])
