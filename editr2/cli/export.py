"""`editr2 export`"""

from __future__ import annotations

from pathlib import Path

from editr2.cli.flags import Arguments, Flags
from editr2.cli.loading import load_libraries
from editr2.errors import ConfigError


def command(arguments: Arguments) -> int:
    """write a run's policy for other programs, proved to load"""
    from editr2.export.push import is_export, name_problem, open_hub

    flags = Flags(
        "editr2 export",
        "Write a run's policy for other programs; what they load must answer as the policy did, or "
        "nothing is written. With --push, and only then, it is uploaded as well; an export that "
        "was written before is uploaded as it is.",
        [
            ("runs/demo --out exported", "adapters, or the weights where all of them train"),
            ("runs/mine --out exported --merge", "adapters added to the weights"),
            ("exported --push me/my-editor --private", "an export that you have read, to the hub"),
        ],
    )
    flags.add("run", path=True, help="a run's folder; its newest checkpoint is taken")
    pushes = any(word.partition("=")[0] == "--push" for word in arguments)
    flags.add("--out", path=True, required=not pushes, help="folder to write, new or empty")
    flags.add("--weights", help="ema (averaged; the default where there is one) or live")
    flags.add(
        "--merge", action="store_true", help="add LoRA to the weights it adapts and write them all"
    )
    flags.add(
        "--push",
        check=name_problem,
        what="OWNER/NAME",
        help="upload to this repository of the Hugging Face hub, with the card; with an export's "
        "folder in place of a run's, --out is not needed",
    )
    flags.add("--private", action="store_true", help="the repository is made for you alone")
    flags.add(
        "--update",
        action="store_true",
        help="commit to a repository that is there, in place of its files",
    )
    options = flags.parse(arguments)
    load_libraries()
    run, out, name = Path(options["run"]), options["out"], options["push"]
    ready = out is None and is_export(run)
    if name is None:
        for flag in ("private", "update"):
            if options[flag]:
                raise ConfigError(f"--{flag}: says how to upload (accepted with --push OWNER/NAME)")
    elif out is None and not ready:
        raise ConfigError(
            f"--out: missing (accepted without it: the folder of an export, which {run} is not)"
        )
    elif ready and (options["merge"] or options["weights"]):
        flag = "--merge" if options["merge"] else "--weights"
        raise ConfigError(f"{flag}: {run} is exported already (accepted with the folder of a run)")
    # Before minutes of exporting, for what cannot be uploaded then.
    hub = name and open_hub(name, private=options["private"], update=options["update"])
    folder = run if ready else Path(out)
    if not ready:
        from editr2.export.export import export

        print(export(run, folder, weights=options["weights"], merge=options["merge"]), flush=True)
    if hub:
        print(f"pushed: {hub.push(folder)}")
    return 0
