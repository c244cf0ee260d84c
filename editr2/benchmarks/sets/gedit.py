"""`gedit`, `gedit-cn`: GEdit-Bench (arXiv 2504.17761), 606 single edits in 11 groups, in English or
in Chinese. SC, PQ and O = √(SC · PQ) of an edit, means in a group, and the mean of the groups, out
of 10.

As released, judge and editor see the source at about 512²; here the editor's size says, and the
judge sees what the editor saw. The set's `Intersection_exist` marks what every editor of its paper
answered; it is in the session's meta, and all edits count.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from editr2.benchmarks.table import Benchmark, Reference, Source
from editr2.config import RewardUse
from editr2.sessions import Session
from editr2.sessions.importers import formats, unique

NAME = "hf:stepfun-ai/GEdit-Bench"

EDITSCORE_PROMPTS = ("5ee322d164fd",)
"""Of EditScore's evaluation (github.com/VectorSpaceLab/EditScore at 6e0f1b9a, `prompts:
CHECKOUT/examples/OmniGen2-RL/evaluation/GEdit-Bench`), which say one word more than GEdit-Bench's
own (23738939bd79, `prompts: CHECKOUT/GEdit-Bench` of Step1X-Edit; those of VIEScore)."""


def read(source: Source, language: str = "en") -> Iterator[Session]:
    """The edits in one language, sessions of one turn, whose ids are their keys."""
    path = source.given(f"{NAME}, or a folder that `datasets` saved it to")
    source.without_images()
    return unique(formats.gedit(formats.Source(path, None, None, "--sources"), language))


REWARD = RewardUse(name="viescore", options={"scores": ["SC", "PQ", "O"]})
HEADLINE = ("SC", "PQ", "O")
ABOUT = "huggingface.co/datasets/stepfun-ai/GEdit-Bench; MIT by its card"

GEDIT = Benchmark(
    title="GEdit-Bench-EN",
    read=read,
    reward=REWARD,
    headline=HEADLINE,
    scale=10.0,
    measures="gedit",
    layouts=("gedit", "edival", "outputs"),
    references=(
        Reference(
            name="OmniGen2-EditScore7B-v1.1",
            measure="O",
            value=7.01,
            source="EditScore's README (October 2025)",
            judge="gpt-4.1",
            prompts=EDITSCORE_PROMPTS,
        ),
    ),
    about=ABOUT,
)

GEDIT_CN = Benchmark(
    title="GEdit-Bench-CN",
    read=partial(read, language="cn"),
    reward=REWARD,
    headline=HEADLINE,
    scale=10.0,
    measures="gedit",
    layouts=("gedit", "edival", "outputs"),
    about=ABOUT,
)
