"""The versions of Python, packages and this project that made a file. They are only recorded."""

import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "numpy")
ROOT = Path(__file__).resolve().parents[2]


@cache
def made_with() -> dict[str, str]:
    """Return the versions that this process uses, by name; "unknown" if one cannot be found."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return {**versions, "project": commit(ROOT) or "unknown"}


def commit(folder: Path) -> str | None:
    """Return the commit of a git checkout, without git; None elsewhere."""
    try:
        git = folder / ".git"
        if git.is_file():  # of a worktree or a submodule: the path of the folder
            git = folder / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            shared = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
            head = read_ref(shared, head.removeprefix("ref: "))
    except OSError:
        return None
    return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else None


def read_ref(git: Path, name: str) -> str:
    """Return the commit of a branch, from its file or from the file of all packed ones."""
    if (git / name).is_file():
        return (git / name).read_text().strip()
    packed = (line.split() for line in (git / "packed-refs").read_text().splitlines())
    return next((words[0] for words in packed if words[1:] == [name]), "")
