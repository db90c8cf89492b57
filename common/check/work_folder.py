"""Check whether the work folder can be written, and which processes use it."""

import tempfile
from pathlib import Path

from common.artifacts.locks import holders
from common.check.lines import FAILS, FINE, WARNING, Check, Checks


def work_folder(work: Path) -> Checks[None]:
    """Yield whether the work folder can be written, and which processes use it."""
    folder = existing(work)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        yield Check("work folder", FINE, f"{folder} can be written")
    except OSError as error:
        yield Check(
            "work folder",
            FAILS,
            f"{folder} cannot be written ({error.strerror})",
            "free some space, get write permission, or give another --work",
        )
    for told in holders(work):
        yield Check("work folder", WARNING, told, "wait until it ends before making the same output")


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
