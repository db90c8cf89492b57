"""The one exception for what a user can fix, and how long lists and commands are printed."""

import shlex
from collections.abc import Iterable
from pathlib import Path

DATA = Path("data")  # the input folder, which commands name where it is another

WORKER_LOST = (
    "a worker process was killed (perhaps memory ran out); finished work is kept. Run the same command again to go on, "
    "if need be with a lower --jobs"
)


class UserError(Exception):
    """Say what was expected, what was found and the cure; ends a script with exit code 2."""


# What CUDA, cuDNN, cuBLAS and NCCL say of a full GPU, beside torch's own error.
FULL = ("out of memory", "status_alloc_failed", "host_allocation_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the GPU's memory is full, without loading torch."""
    text = str(error).lower()
    return (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, RuntimeError)
        and any(words in text for words in FULL)
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listing(items: Iterable[object], limit: int = 10) -> str:
    """Join the first `limit` items, one a line, and count the rest."""
    items = list(items)
    lines = [f"  {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more ({len(items)} in all)")
    return "\n".join(lines)


def command(script: str, *arguments: object) -> str:
    """Return the command line of a script so that it can be pasted, whatever its paths are called."""
    return shlex.join(["bash" if script.endswith(".sh") else "python", script, *map(str, arguments)])


def nearest(word: str, known: Iterable[str], every: bool = False) -> str:
    """Return 'did you mean X?' for the known word nearest to `word`, followed by all of them with `every`; else a list of all."""
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    guess, listed = f"did you mean {close[0]}?" if close else "", f"known: {', '.join(known)}"
    return f"{guess} {listed}".strip() if every or not guess else guess
