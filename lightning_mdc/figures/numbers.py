"""Numbers as people read them, in pictures, tables and sentences alike."""

from __future__ import annotations


def scaled(number: float) -> str:
    """Four digits and a prefix: ``22418816`` is ``22.42 M``."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {prefix}"
    return f"{number:.0f} "


def counted(number: float) -> str:
    """A count: ``351``; a mean over seeds keeps one decimal, ``350.7``."""
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.1f}"


def percent(fraction: float) -> str:
    """A fraction in per cent: ``0.5985`` is ``59.9 %``."""
    return f"{fraction:.1%}".replace("%", " %")


def seconds(value: float) -> str:
    """A duration with its unit: ``0.0021`` is ``2.10 ms``."""
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} µs"
