"""common/setup.sh: the Python that run_all.sh and the tests take, in a folder of its own with other requirements."""

import fcntl
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def setup(tmp_path):
    """Return a function that starts the set-up for packages that nobody has."""
    (tmp_path / "common").mkdir()
    for name in ("setup.sh", "environment.py"):
        shutil.copy(ROOT / "common" / name, tmp_path / "common")
    (tmp_path / "requirements.txt").write_text("no-such-package-anywhere>=1\n")

    def start(path):
        environment = {**os.environ, "PATH": str(path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
        return subprocess.Popen(["/bin/bash", "-c", "set -euo pipefail; source common/setup.sh requirements.txt"], cwd=tmp_path,
                                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start


def test_without_a_python_that_is_new_enough(setup, tmp_path):
    old = tmp_path / "bin"
    old.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        (old / name).write_text("#!/bin/sh\nexit 1\n")
        (old / name).chmod(0o755)
    process = setup(old)
    assert process.communicate(timeout=60) == ("", "error: Python 3.11 or later is needed and was not found; install it, then run this again\n")
    assert process.returncode == 2


def test_one_at_a_time_and_packages_that_cannot_be_had(setup, tmp_path):
    with open(tmp_path / ".venv.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        process = setup(f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
        assert process.stderr.readline() == "waiting: .venv is being made by another process\n"
        assert not (tmp_path / ".venv").exists()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and error.startswith("setting up .venv once (several GB, mostly torch)\n")
    assert "error: the packages could not be installed into .venv; this is what the active Python lacks:\n" in error
    assert "no-such-package-anywhere: expected >=1, found nothing\n" in error
    assert error.endswith("install these by hand (without internet: from wheels), then run this again\n")
