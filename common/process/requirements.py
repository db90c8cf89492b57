"""Tell whether this Python satisfies requirement files; needs only the standard library and pip.

example python common/process/requirements.py requirements.txt
"""

import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from packaging.requirements import Requirement

MINIMUM = (3, 11)
# Wheels of the same library: any of them will do.
SAME = {
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
    "faiss-cpu": ("faiss-gpu-cu12", "faiss-gpu"),
}
LARGE = ("torch", "torchvision")
ON_TORCH = (*LARGE, "pretrainedmodels", "captum", "timm")  # torch and packages that depend on it


def requirement(text: str) -> "Requirement":
    """Parse a line of a requirement file."""
    try:
        from packaging import requirements
    except ImportError:
        from pip._vendor.packaging import requirements as pips  # the same code

        return cast("Requirement", pips.Requirement(text))
    return requirements.Requirement(text)


def read_requirements(files: list[str]) -> list:
    """Return the requirements of files, plus missing dependencies of ON_TORCH packages: pip installs those alone."""
    lines = (
        line.split("#")[0].strip() for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()
    )
    wanted = [requirement(line) for line in lines if line]
    for name in [
        wish.name for wish in wanted if wish.name in ON_TORCH and wish.name not in LARGE and installed(wish.name)
    ]:
        needs = [requirement(line) for line in metadata.requires(name) or ()]
        wanted += [
            need
            for need in needs
            if (not need.marker or need.marker.evaluate({"extra": ""}))
            and need.name not in ON_TORCH
            and not installed(need.name)
        ]
    return wanted


def installed(name: str) -> tuple[str, str] | None:
    """Return the name and version of the installed distribution, or of an equivalent in SAME; None without one."""
    for candidate in (name, *SAME.get(name, ())):
        try:
            return candidate, metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def serves(wish: "Requirement") -> bool:
    found = installed(wish.name)
    return found is not None and wish.specifier.contains(found[1].split("+")[0], prereleases=True)


def unmet(files: list[str]) -> list[str]:
    """Return the packages that are missing or out of range, as 'name: expected X, found Y'."""
    if sys.version_info < MINIMUM:
        return [f"python: expected {'.'.join(map(str, MINIMUM))} or later, found {sys.version.split()[0]}"]
    return [
        f"{wish.name}: expected {wish.specifier or 'any version'}, found {(installed(wish.name) or ('', 'nothing'))[1]}"
        for wish in read_requirements(files)
        if not serves(wish)
    ]


def next_install(files: list[str]) -> list[str]:
    """Return the arguments of the `pip install` to run next; empty if nothing is missing.

    If torch is in range, it stays. Packages that depend on it come first, without dependencies: pip would also resolve
    torch's, and hosted notebooks have other versions of its CUDA libraries, several GB. All other packages come next.
    """
    missing = [wish for wish in read_requirements(files) if not serves(wish)]
    if any(wish.name in LARGE for wish in missing):
        return [argument for file in files for argument in ("-r", file)]
    on_torch = [str(wish) for wish in missing if wish.name in ON_TORCH]
    return ["--no-deps", *on_torch] if on_torch else [str(wish) for wish in missing]


def pins(files: list[str]) -> list[str]:
    """Return a constraint for each package that is fine, so that pip leaves it as it is."""
    found = [installed(wish.name) for wish in read_requirements(files) if serves(wish)]
    return ["==".join(name_and_version) for name_and_version in found if name_and_version]


def main(arguments: list[str]) -> int:
    """Print what is missing and return 1, else 0; with --next-install or --pins print what those functions return."""
    if arguments[:1] == ["--next-install"]:
        print(shlex.join(next_install(arguments[1:])))
    elif arguments[:1] == ["--pins"]:
        print(*pins(arguments[1:]), sep="\n")
    elif missing := unmet(arguments):
        print(*missing, sep="\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
