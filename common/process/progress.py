"""Progress with an estimate of the time left: a bar on a terminal, a plain line now and then elsewhere."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15


def has_terminal() -> bool:
    """Tell whether a bar can move in place: not in a file, a notebook or a worker process."""
    return sys.stderr.isatty() and "JPY_PARENT_PID" not in os.environ and multiprocessing.parent_process() is None


def progress(
    iterable: Iterable[T], total: int, label: str, unit: str = "samples", initial: int = 0, quiet: bool = False
) -> Iterator[T]:
    """Yield from `iterable` while showing progress and the time left; `quiet` shows nothing."""
    if quiet:
        yield from iterable
        return
    if has_terminal():
        from tqdm import tqdm

        yield from tqdm(
            iterable, total=total, initial=initial, desc=label, unit=f" {unit}", leave=False, dynamic_ncols=True
        )
        return
    started = shown = time.time()
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.time()
        if now - shown >= SECONDS_BETWEEN_LINES and initial + done < total:
            left = (now - started) / done * (total - initial - done)
            print(f"{label}: {initial + done}/{total} {unit}, {left:.0f} s left", file=sys.stderr, flush=True)
            shown = now
