"""The pictures of pages in the docs: `python scripts/screenshots.py [NAME …]` trains a small run
(minutes on two cores), opens its pages in headless Chromium and writes docs/images/*.png. Needs
editr2[dev] and an installed Chromium.

A new picture is an entry of `SHOTS`; what it shows is one of `PAGES`.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "images"
RUNS = ROOT / "runs" / "screenshots"
COLOURS = 256
"""Of a picture's palette: a page of text and flat charts loses nothing that is seen, and takes a
third."""

TRAINED = {
    "first": (),
    "second": ("--seed=1",),
}
"""Runs and their flags; each is trained once and then kept."""
COMMON = ("--rollout.sessions=4", "--rollout.siblings=4", "--train.iterations=12")
COMMON += ("--eval.sessions=60", "--eval.every=3", "--eval.strips=4")


def editr2(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "editr2", *words], check=True, cwd=ROOT)


def trained(name: str) -> Path:
    folder = RUNS / name
    if not (folder / "report.html").is_file():
        editr2("train", f"--out={folder}", *COMMON, *TRAINED[name])
    return folder


@contextmanager
def report() -> Iterator[str]:
    folder = trained("first")
    editr2("report", str(folder))
    yield (folder / "report.html").as_uri()


@contextmanager
def compare() -> Iterator[str]:
    out = RUNS / "compared"
    editr2("report", str(trained("first")), str(trained("second")), f"--out={out}")
    yield (out / "compare.html").as_uri()


@contextmanager
def watch() -> Iterator[str]:
    words = [sys.executable, "-u", "-m", "editr2", "watch", str(trained("first")), "--port=0"]
    with subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            yield next(
                word for line in server.stdout for word in line.split() if word.startswith("http")
            )
        finally:
            server.terminate()


PAGES: dict[str, Callable[[], contextlib.AbstractContextManager[str]]] = {
    "report": report,
    "compare": compare,
    "watch": watch,
}
"""Pages by name: what makes one, and gives its address as long as it is wanted."""


@dataclass(frozen=True)
class Shot:
    """page: of `PAGES`. width and height of the window. click: what is clicked first, in turn. at:
    what is scrolled to. element: what is taken alone."""

    page: str
    width: int = 1280
    height: int = 900
    scheme: str = "light"
    click: tuple[str, ...] = ()
    at: str = ""
    element: str = ""


SHOTS = {
    "report-1280-light": Shot("report"),
    "report-1280-dark": Shot("report", scheme="dark"),
    "report-400-light": Shot("report", width=400),
    "report-400-dark": Shot("report", width=400, scheme="dark"),
    "report-curves": Shot("report", at="#curves"),
    "report-sessions": Shot(
        "report",
        click=("table.sessions th:has-text('after') button", "button.open >> nth=0"),
        at="form.filters",
    ),
    "strip": Shot("report", element="section[aria-labelledby=strips] article.session >> nth=0"),
    "compare-1280-light": Shot("compare"),
    "compare-400-dark": Shot("compare", width=400, scheme="dark"),
    "watch-1280-light": Shot("watch"),
    "watch-400-dark": Shot("watch", width=400, scheme="dark"),
}


def take(browser: Any, address: str, shot: Shot, path: Path) -> None:
    size = {"width": shot.width, "height": shot.height}
    page = browser.new_page(viewport=size, color_scheme=shot.scheme)
    page.goto(address)
    page.wait_for_timeout(500)
    for clicked in shot.click:
        page.click(clicked)
    if shot.at:
        page.evaluate("at => document.querySelector(at).scrollIntoView()", shot.at)
    (page.locator(shot.element) if shot.element else page).screenshot(path=path)
    page.close()
    image = Image.open(path).convert("RGB")
    image.quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes", flush=True)


def main(names: list[str]) -> int:
    from playwright.sync_api import sync_playwright

    unknown = sorted(set(names) - set(SHOTS))
    if unknown:
        print(f"{', '.join(unknown)} (accepted: {', '.join(SHOTS)})", file=sys.stderr)
        return 2
    wanted = {name: SHOTS[name] for name in names or SHOTS}
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))))
    OUT.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for page in dict.fromkeys(shot.page for shot in wanted.values()):
            with PAGES[page]() as address:
                for name, shot in wanted.items():
                    if shot.page == page:
                        take(browser, address, shot, OUT / f"{name}.png")
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
