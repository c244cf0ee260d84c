"""One offline HTML page of a run: what it did to the rewards, and a film-strip of every session."""

from pathlib import Path

from editr2.report.build import build_report

TEMPLATES = Path(__file__).parent / "templates"

__all__ = ["TEMPLATES", "build_report"]
