"""A line of the check's output, and the format of sizes and times in it."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

T = TypeVar("T")
FINE, WARNING, FAILS, ESTIMATE = "fine", "warning", "will fail", "estimate"


@dataclass(frozen=True)
class Check:
    """What was checked, its state, what was found, and how to fix it."""

    name: str
    state: str
    found: str
    cure: str = ""

    def __str__(self) -> str:
        text = self.found + (f"\n-> {self.cure}" if self.cure else "")
        return f"{self.state:10s} {self.name:22s} " + text.replace("\n", f"\n{'':34s}")


Checks: TypeAlias = Generator[Check, None, T]  # yields lines, returns input of later checks


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Format a time in a suitable unit."""
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
