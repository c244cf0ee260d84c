"""Numbers as the page writes them: two decimals, a real minus sign, "–" for what is missing."""

from __future__ import annotations

from editr2.report.data import Stat


def signed(value: float, decimals: int = 2) -> str:
    text = f"{value:+.{decimals}f}".replace("-", "−")
    return text.replace("+", "±") if float(f"{value:.{decimals}f}") == 0 else text


def decimal(value: float | None, decimals: int = 2) -> str:
    return "–" if value is None else f"{value:.{decimals}f}".replace("-", "−")


def with_se(stat: Stat) -> str:
    if stat.mean is None:
        return "–"
    decimals = 3 if stat.se is not None and 0 < stat.se < 0.01 else 2
    return decimal(stat.mean, decimals) + ("" if stat.se is None else f" ± {stat.se:.{decimals}f}")
