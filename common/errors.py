"""The exception for errors that a user can fix, and how messages print long lists and commands."""

import shlex
from collections.abc import Iterable
from pathlib import Path

DATA = Path("data")  # the default input folder; commands name it only if it is another

WORKER_LOST = (
    "a worker process was killed (perhaps memory ran out); finished work is kept. To resume, run the same command "
    "again, with a lower --jobs if needed"
)


class UserError(Exception):
    """Say what was expected, what was found and how to fix it; ends a script with exit code 2."""


# How CUDA, cuDNN, cuBLAS and NCCL report a full GPU; torch has an error of its own.
FULL = ("out of memory", "status_alloc_failed", "host_allocation_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the GPU is out of memory, without loading torch."""
    text = str(error).lower()
    return (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, RuntimeError)
        and any(words in text for words in FULL)
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listing(items: Iterable[object], limit: int = 10) -> str:
    """Join the first `limit` items, one per line, and count the rest."""
    items = list(items)
    lines = [f"  {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more ({len(items)} in all)")
    return "\n".join(lines)


def command(script: str, *arguments: object) -> str:
    """Return a script's command line, quoted so that it can be pasted."""
    return shlex.join(["bash" if script.endswith(".sh") else "python", script, *map(str, arguments)])


def nearest(word: str, known: Iterable[str], every: bool = False) -> str:
    """Return 'did you mean X?' for the known word nearest to `word`, or a list of all where none is near.

    every : add the list in any case
    """
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    guess, listed = f"did you mean {close[0]}?" if close else "", f"known: {', '.join(known)}"
    return f"{guess} {listed}".strip() if every or not guess else guess
