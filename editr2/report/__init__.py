"""One offline HTML page of a run: what it did to the rewards, and a film-strip of every session."""

from editr2.report.build import build_report

__all__ = ["build_report"]
