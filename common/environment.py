"""Tell whether this Python has what requirement files ask for; needs the standard library and pip alone.

example python common/environment.py requirements.txt
"""

import sys
from importlib import metadata
from pathlib import Path

MINIMUM = (3, 11)
# Two wheels of one library: either serves.
SAME = {"opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
        "faiss-cpu": ("faiss-gpu-cu12", "faiss-gpu")}


def unmet(files: list[str]) -> list[str]:
    """Return what is missing or outside its range, as 'name: expected X, found Y'."""
    if sys.version_info < MINIMUM:
        return [f"python: expected {'.'.join(map(str, MINIMUM))} or later, found {sys.version.split()[0]}"]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement

    problems = []
    for line in (line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()):
        text = line.split("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        found = installed(requirement.name)
        if found is None or not requirement.specifier.contains(found.split("+")[0], prereleases=True):
            problems.append(f"{requirement.name}: expected {requirement.specifier}, found {found or 'nothing'}")
    return problems


def installed(name: str) -> str | None:
    """Return the installed version of a distribution, or of one that stands for it."""
    for candidate in (name, *SAME.get(name, ())):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


if __name__ == "__main__":
    missing = unmet(sys.argv[1:])
    print("\n".join(missing))
    sys.exit(1 if missing else 0)
