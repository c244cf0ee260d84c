"""`edival`: EdiVal-Bench (arXiv 2509.13399), 572 images of three turns each. Its notebook has
multi-turn and marginal success; CC and O are its paper's. Quality (HPSv3) is left out: it needs an
environment of its own."""

from __future__ import annotations

from collections.abc import Iterator

from editr2.benchmarks.table import Benchmark, Reference, Source
from editr2.config import RewardUse
from editr2.sessions import Session
from editr2.sessions.importers import formats, unique

FILE = "oai_instruction_generation_output.csv"

JUDGE = "qwen2-vl-7b"
PROMPTS = ("00f3776cc6d1",)
"""Of the released ones, as `prompts: CHECKOUT` hashes them (github.com/TianyuCodings/EdiVal at
a7bbdec; scripts/check_benchmarks.py)."""

LEADERBOARD = {
    "Seedream 4.0": 59.76,
    "Nano Banana": 56.24,
    "GPT-Image-1": 53.81,
    "FLUX.1-Kontext-max": 53.04,
    "Gemini 2.0 Flash": 47.94,
    "Qwen-Image-Edit": 41.93,
    "Step1X-Edit": 38.98,
    "FLUX.1-Kontext-dev": 38.71,
    "OmniGen": 29.91,
    "UltraEdit": 22.89,
    "AnyEdit": 22.50,
    "MagicBrush": 19.41,
    "InstructPix2Pix": 12.99,
}
"""O at turn 3, in per cent."""


def read(source: Source) -> Iterator[Session]:
    """The sessions of the CSV, whose ids are its `image_index`, as its evaluator names files."""
    path = source.given(f"{FILE}, or the folder that has it")
    return unique(formats.edival(formats.Source(path, source.images, None, "--sources")))


def _reference(name: str, value: float, source: str) -> Reference:
    return Reference(name, "O_of_means@3", value, source, JUDGE, PROMPTS)


EDIVAL = Benchmark(
    title="EdiVal-Bench",
    read=read,
    resize="stretch",  # as its own code does, to 512²
    reward=RewardUse(name="edival"),
    headline=("O_of_means@3", "O_of_roots@3", "success@3", "marginal@3", "CC@3"),
    scale=100.0,
    measures="edival",
    references=(
        *(
            _reference(name, value, "EdiVal's README, leaderboard (October 2025)")
            for name, value in LEADERBOARD.items()
        ),
        _reference("MT-EditFlow on FLUX.1-Kontext-dev", 45.56, "arXiv 2606.01985"),
    ),
    about="github.com/TianyuCodings/EdiVal; its README has badges of MIT and CC-BY-SA-4.0",
)
