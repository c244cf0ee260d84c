"""`editr2 export`"""

from __future__ import annotations

from pathlib import Path

from editr2.cli.flags import Arguments, Flags
from editr2.cli.loading import load_libraries


def command(arguments: Arguments) -> int:
    """write a run's policy for other programs, proved to load"""
    flags = Flags(
        "editr2 export",
        "Write a run's policy for other programs; what they load must answer as the policy did, or "
        "nothing is written.",
        [
            ("runs/demo --out exported", "adapters, or the weights where all of them train"),
            ("runs/mine --out exported --merge", "adapters added to the weights"),
        ],
    )
    flags.add("run", path=True, help="a run's folder; its newest checkpoint is taken")
    flags.add("--out", path=True, required=True, help="folder to write, new or empty")
    flags.add("--weights", help="ema (averaged; the default where there is one) or live")
    flags.add(
        "--merge", action="store_true", help="add LoRA to the weights it adapts and write them all"
    )
    options = flags.parse(arguments)
    load_libraries()
    from editr2.export.export import export

    done = export(
        Path(options["run"]),
        Path(options["out"]),
        weights=options["weights"],
        merge=options["merge"],
    )
    print(done)
    return 0
