"""`editr2 watch`"""

from __future__ import annotations

from pathlib import Path

from editr2.cli.flags import Arguments, Flags
from editr2.config.fields import Bounds
from editr2.errors import ConfigError
from editr2.files import RUN_FILES, runs_near


def command(arguments: Arguments) -> int:
    """follow a run on a local page"""
    flags = Flags(
        "editr2 watch",
        "Follow a run, also one that has not begun, on a page of 127.0.0.1. Nothing in its folder "
        "is changed.",
        [
            ("runs/demo", "a run that is at work, or one that ended"),
            ("runs/next --port 8500", "one that has not begun yet, at a port of your choice"),
        ],
    )
    flags.add("run", path=True, help="a run's folder, of train or of a verifier's training")
    flags.add(
        "--port",
        type=int | None,
        bounds=Bounds(at_least=0, at_most=65_535),
        help="of 127.0.0.1; 0 is any free one; none: 8421, or any while that is taken",
    )
    options = flags.parse(arguments)
    folder = Path(options["run"])
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: a file (accepted: a run's folder, or where one will be)")
    from editr2 import serving
    from editr2.watch.serve import Watch, listen, serve, token_of

    watch = Watch(folder, token_of(folder))
    watch.app()  # without the extra there is nothing to open
    listening = listen(options["port"])
    print(f"{folder}: {serving.address(watch.token, listening)}", flush=True)
    if not any((folder / name).exists() for name in RUN_FILES):
        print(f"no run is there yet, and the page waits for one{runs_near(folder)}", flush=True)
    print("Ctrl-C ends the page; the run is not touched", flush=True)
    serve(watch, listening)
    return 0
