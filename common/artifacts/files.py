"""Write files completely or not at all."""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError

LEFTOVER = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")
SECONDS_UNTIL_LEFT = 3600


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add this file's name to an OSError without one (a full disk, say), also if another error hides it."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                cause.filename = cause.filename or str(path)
            cause = cause.__cause__ or cause.__context__
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: many writers choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with naming(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Delete a folder's temporary files that killed processes left: those that nobody has written to for an hour."""
    with os.scandir(folder) as entries:
        names = [entry.path for entry in entries if LEFTOVER.fullmatch(entry.name)]
    for name in names:
        with contextlib.suppress(OSError):  # another process was faster, or another user's file must stay
            if time.time() - os.stat(name).st_mtime > SECONDS_UNTIL_LEFT:
                os.unlink(name)


def csv_files(folder: Path) -> list[Path]:
    """Return the CSV files of a folder, without temporary files that a killed process left."""
    return [path for path in folder.glob("*.csv") if not path.name.startswith(".")]


def write_text(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises a UserError with its name if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run its stage again") from None


def read_lines(path: Path) -> list[dict]:
    """Read a file of JSON lines; raises a UserError with its name if it is damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train its fold again") from None
