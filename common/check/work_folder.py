"""Check whether the work folder can be written, and which processes use it."""

import tempfile
from pathlib import Path

from common.artifacts.locks import holders
from common.check.lines import FAILS, FINE, WARNING, Check, Checks


def work_folder(work: Path) -> Checks[None]:
    """Yield whether the work folder can be written, and which processes use it."""
    folder = existing(work)
    if reason := why_unwritable(folder):
        cure = "free some space, get write permission, or give another --work"
        yield Check("work folder", FAILS, f"{folder} cannot be written ({reason})", cure)
    else:
        yield Check("work folder", FINE, f"{folder} can be written")
    for told in holders(work):
        yield Check("work folder", WARNING, told, "wait until it ends before making the same output")


def why_unwritable(folder: Path) -> str | None:
    """Return why a file of a few kilobytes cannot be written to a folder; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        return str(error.strerror)
    return None


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
