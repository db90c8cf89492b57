"""common/setup.sh: the Python that run_all.sh and the tests use, in a separate folder with other requirements."""

import fcntl
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def setup(tmp_path):
    """Return a function that starts the setup without an index, for torch and a package that does not exist."""
    (tmp_path / "common" / "process").mkdir(parents=True)
    for name in ("setup.sh", "process/requirements.py"):
        shutil.copy(ROOT / "common" / name, tmp_path / "common" / name)
    (tmp_path / "requirements.txt").write_text("torch>=99\nno-such-package-anywhere>=1\n")

    def start(path, wheels="", options=""):
        environment = {
            **os.environ,
            "PATH": str(path),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheels),
            "PIP_CONFIG_FILE": os.devnull,
        }
        script = f'set -euo pipefail; source common/setup.sh {options} requirements.txt; echo "$PYTHON"'
        return subprocess.Popen(
            ["/bin/bash", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def distribution(name, version, *needs):
    """Return the files of an installed package with only a name and requirements."""
    folder = f"{name}-{version}.dist-info"
    metadata = "".join(
        f"{line}\n"
        for line in (
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {need}" for need in needs),
        )
    )
    return {
        f"{folder}/METADATA": metadata,
        f"{folder}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{folder}/RECORD": f"{folder}/METADATA,,\n{folder}/WHEEL,,\n{folder}/RECORD,,\n",
    }


def wheel(folder, name, version, *needs):
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in distribution(name, version, *needs).items():
            file.writestr(path, text)


@pytest.fixture
def notebook(tmp_path):
    """Return the programs' folder of a Python like a hosted notebook's, and a folder of wheels.

    It has pip, torch with CUDA libraries other than those it requires, and an older NumPy.
    """
    pip = next((Path(os.__file__).parent / "ensurepip" / "_bundled").glob("pip-*.whl"), None)
    if pip is None:
        pytest.skip("this Python comes without ensurepip")
    venv.create(tmp_path / "active", with_pip=False, symlinks=True)
    packages = next((tmp_path / "active" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(pip).extractall(packages)
    for made in (
        ("torch", "2.6.0+cu124", "nvidia-cublas-cu12==12.4.5.8"),
        ("torchvision", "0.21.0", "torch==2.6.0"),
        ("numpy", "1.26.4"),
    ):
        for path, text in distribution(*made).items():
            (packages / path).parent.mkdir(exist_ok=True)
            (packages / path).write_text(text)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "captum", "0.9.0", "torch>=1.10", "numpy", "munch", 'pytest; extra == "test"')
    wheel(wheels, "munch", "4.0.0")
    wheel(wheels, "numpy", "2.4.0")
    wheel(wheels, "hashes", "1.0", "numpy")
    wheel(wheels, "hashes", "2.0", "numpy>=2")
    return tmp_path / "active" / "bin", wheels


def test_without_a_python_that_is_new_enough(setup, tmp_path):
    old = tmp_path / "bin"
    old.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        (old / name).write_text("#!/bin/sh\nexit 1\n")
        (old / name).chmod(0o755)
    process = setup(old)
    assert process.communicate(timeout=60) == (
        "",
        "error: expected Python 3.11 or later, found none; install it, then run this again\n",
    )
    assert process.returncode == 2


def test_one_at_a_time_and_packages_that_cannot_be_had(setup, tmp_path):
    with open(tmp_path / ".venv.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        process = setup(f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
        assert process.stderr.readline() == "waiting: another process is making .venv\n"
        assert not (tmp_path / ".venv").exists()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and error.startswith("setting up .venv once (several GB, mostly torch)\n")
    assert "error: the packages could not be installed into .venv; these are missing:\n" in error
    assert "no-such-package-anywhere: expected >=1, found nothing\n" in error
    assert error.endswith(
        "with internet access, or with their wheels in a folder: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER bash run_all.sh\n"
    )


def test_a_torch_in_range_is_kept_and_only_what_it_lacks_is_installed(setup, notebook, tmp_path):
    active, wheels = notebook
    path = f"{active}:/usr/bin:/bin"
    (tmp_path / "requirements.txt").write_text(
        "torch>=2.6,<3\ntorchvision>=0.21,<1\nnumpy>=1.26,<3\ncaptum>=0.7,<1\nhashes>=1\n"
    )
    assert (
        setup(path, options="--dry-run")
        .communicate(timeout=60)[0]
        .startswith("bash common/setup.sh requirements.txt\n")
    )
    assert not (tmp_path / ".venv").exists()

    (wheels / "munch-4.0.0-py3-none-any.whl").rename(tmp_path / "munch")
    interrupted = setup(path, wheels)
    assert (
        "munch: expected any version, found nothing" in interrupted.communicate(timeout=120)[1]
        and interrupted.returncode == 2
    )
    (tmp_path / "munch").rename(wheels / "munch-4.0.0-py3-none-any.whl")

    process = setup(path, wheels)
    assert process.communicate(timeout=120) == (
        ".venv/bin/python\n",
        "setting up .venv once: small packages that are missing from the active Python (its torch is used)\n",
    )
    installed = {path.name for path in tmp_path.glob(".venv/lib/python*/site-packages/*.dist-info")}
    assert installed == {"captum-0.9.0.dist-info", "munch-4.0.0.dist-info", "hashes-1.0.dist-info"}
    assert setup(path).communicate(timeout=60) == (".venv/bin/python\n", "")

    (tmp_path / "requirements.txt").write_text("torch>=2.6,<3\nmore>=1\n")
    wheel(wheels, "more", "1.0")
    within = f"{tmp_path}/.venv/bin:/usr/bin:/bin"  # as after: source .venv/bin/activate
    assert setup(within, wheels).communicate(timeout=120)[0] == ".venv/bin/python\n"
    assert setup(within).communicate(timeout=60) == (f"{tmp_path}/.venv/bin/python\n", "")
