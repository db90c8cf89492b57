"""Let one process at a time make an output: a lock beside it, and the message that says who holds the lock.

The operating system keeps the lock (flock, through filelock). It ends with its process, however that ends, so it is
never stale; on NFS it ends when the server misses the machine, after a minute or two. The record of the holder is for
messages only. Both are hidden files beside the output: `.<name>.lock` and `.<name>.lock.json`.
"""

import getpass
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from common.artifacts.files import clear_leftovers, write_json
from common.errors import UserError

# Loader workers of a killed process end within the first, a process that is just saving and leaving within the second.
SECONDS_AFTER_DEATH, SECONDS_OF_GRACE = 15, 4
MODE = 0o666  # of lock files: they stay, and everyone who shares the folder must be able to write them to lock


class Lock:
    """The right to make `place`, a file or folder: until `release`, the end of a `with`, or the end of the process.

    wait : print who holds the lock and wait; otherwise that is a UserError
    other : the flag that gives another folder, for messages
    """

    def __init__(self, place: Path, wait: bool = False, other: str = "--work") -> None:
        self.other = f"or give another {other}"
        path = place.with_name(f".{place.name}.lock")
        self.record = path.with_name(path.name + ".json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(path, mode=MODE)
            self.acquire(place, path, wait)
            clear_leftovers(place if place.is_dir() else path.parent)
            write_json(self.record, this_process())
        except OSError as error:
            raise UserError(
                f"{place} cannot be made: {path.parent} cannot be written to ({error.strerror or error}); free some "
                f"space, get write permission, {self.other}"
            ) from None

    def acquire(self, place: Path, path: Path, wait: bool) -> None:
        try:
            self.lock.acquire(timeout=0)
            return
        except Timeout:
            holder = read_record(self.record)
        except PermissionError:
            if not (os.path.exists(path) and os.access(path.parent, os.W_OK)):
                raise
            raise UserError(unwritable(place, path, read_record(self.record), self.other)) from None
        told = f"{place} is being made by {describe(holder)}"
        if wait:
            print(f"waiting: {told}", flush=True)
        try:
            self.lock.acquire(timeout=-1 if wait else SECONDS_AFTER_DEATH if is_gone(holder) else SECONDS_OF_GRACE)
        except Timeout:
            raise UserError(
                f"{told}\nwait until it has ended, or stop it there, and run this again; {self.other}"
            ) from None

    def release(self) -> None:
        self.record.unlink(missing_ok=True)
        self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def unwritable(place: Path, path: Path, holder: dict, other: str) -> str:
    """Return the message for a lock file that this user may not write: who holds it, or that nobody does."""
    if holder["pid"] and not is_gone(holder):
        return (
            f"{place} is being made by {describe(holder)}\nwait until it has ended, or stop it there, and run this "
            f"again; if it has already ended, delete {path}; {other}"
        )
    return (
        f"{place} cannot be made: you may not write its lock file {path}, and nobody holds it; delete it or have its "
        f"owner delete it, and run this again; {other}"
    )


def holders(work: Path) -> Iterator[str]:
    """Yield a line for each output that is being made in a work folder: which one, and by whom."""
    for record in sorted(work.glob("**/.*.lock.json")):
        path, holder = record.with_suffix(""), read_record(record)
        told = f"{path.with_name(path.name[1:]).with_suffix('')} is being made by {describe(holder)}"
        try:
            FileLock(path, mode=MODE).acquire(timeout=0).lock.release()
        except Timeout:
            yield told
        except OSError:  # it cannot be written: only the record can tell
            if not is_gone(holder):
                yield told


def this_process() -> dict:
    """Return the record of this process for others' messages."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, a user without a name
        user = f"user {os.getuid()}"
    return {
        "user": user,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
    }


def read_record(path: Path) -> dict:
    """Return the holder's record; texts are empty where it is damaged or just being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    found = found if isinstance(found, dict) else {}
    return {key: str(found.get(key, "")) for key in ("user", "host", "pid", "since", "command")}


def describe(holder: dict) -> str:
    if not holder["pid"]:
        return "another process that has not yet recorded its name"
    return "{user} on {host}, process {pid}, since {since}: {command}".format(**holder)


def is_gone(holder: dict) -> bool:
    """Tell whether the holder was a process of this machine that has ended."""
    if holder["host"] != socket.gethostname() or not holder["pid"].isdecimal():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, OverflowError, ValueError):  # the last two: no process has such a number
        return True
    except PermissionError:  # another user's
        pass
    return False
