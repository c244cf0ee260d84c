"""`editr2 quickstart`: everything once, small, with nothing but the installed package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from editr2.cli.flags import Arguments, Flags
from editr2.cli.loading import load_libraries
from editr2.config.fields import Bounds
from editr2.config.rules import folder_problem

if TYPE_CHECKING:
    from PIL.Image import Image

    from editr2.editing import Step
    from editr2.sessions import Session

EXAMPLES, HELDOUT = 16, 24
"""Sessions: those of `examples/shapes`, and of the world's held-out ones."""
SEED = 5  # of examples/shapes
CELL = 144  # pixels of a picture of the sheet: six for one of the world's


def command(arguments: Arguments) -> int:
    """edit and train on example sessions, in a minute or two"""
    flags = Flags(
        "editr2 quickstart",
        "Write the example sessions, edit one with the model that ships, train it on them for a "
        "few iterations, and edit the same one again. Needs no GPU, weights, data or network. "
        "Run it again to go on where it stopped.",
        [
            ("", "into runs/quickstart"),
            ("--out first --iterations 20", "train longer"),
        ],
    )
    flags.add(
        "--out",
        path=True,
        check=folder_problem,
        what="a folder",
        default="runs/quickstart",
        help="folder to write",
    )
    flags.add(
        "--iterations",
        type=int,
        default=8,
        bounds=Bounds(at_least=1, at_most=1000),
        help="of training",
    )
    options = flags.parse(arguments)
    out, run = Path(options["out"]), Path(options["out"]) / "run"
    load_libraries()
    from editr2.config import preset_config, replace_nested
    from editr2.editing import edit
    from editr2.files import in_place_of
    from editr2.sessions import save_sessions
    from editr2.training import train
    from editr2.worlds.shapes import make_session

    examples = [make_session(SEED, i, turns=3) for i in range(EXAMPLES)]
    heldout = [make_session(SEED, i, split="heldout", turns=3) for i in range(HELDOUT)]
    data, apart = (
        save_sessions(sessions, out / name)
        for name, sessions in (("sessions", examples), ("heldout", heldout))
    )
    print(f"1. examples: {data} ({EXAMPLES} sessions), {apart} ({HELDOUT} that are not trained on)")
    shown = heldout[0]
    told = [turn.instruction for turn in shown.turns]
    before = edit(shown.image, told, mode=shown.mode)
    print(f"2. {shown.id}, edited by the model that ships, turn on turn:")
    for step in before:
        print(f"   {step.turn}. {step.instruction}")
    print("3. training on the examples", flush=True)
    wanted = {
        "out": str(run),
        "data": {"path": str(data.parent), "heldout": str(apart.parent)},
        "train": {"iterations": options["iterations"]},
        "eval": {"sessions": HELDOUT, "strips": 6},
    }
    train(replace_nested(preset_config("edit-r2-nft"), wanted))
    after = edit(shown.image, told, mode=shown.mode, policy=run)
    with in_place_of(out / "edited.png") as part:
        sheet(shown, before, after).save(part, "PNG")
    print(
        f"4. {shown.id} before training (above) and after: {out / 'edited.png'}\n"
        f"   the run's page: {run / 'report.html'}\n"
        f"next: editr2 train --data FOLDER, with a sessions.jsonl and images as in {data.parent}"
    )
    return 0


def sheet(session: Session, *passes: list[Step]) -> Image:
    """A row for each pass, of the source and what every turn made of it."""
    from PIL import Image

    page = Image.new("RGB", ((len(passes[0]) + 1) * CELL, len(passes) * CELL), "white")
    for row, steps in enumerate(passes):
        for column, pixels in enumerate([session.image, *(step.pixels for step in steps)]):
            picture = Image.fromarray(pixels).resize((CELL - 4,) * 2, Image.Resampling.NEAREST)
            page.paste(picture, (column * CELL + 2, row * CELL + 2))
    return page
