"""Fixtures for all tests: the project on the path, real data if the environment names it, small input folders."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the scripts do, before torch is loaded

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup lets it be ignored, here and in every process that tests start

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.process import stopping  # noqa: E402
from tests.browser import CHROMIUM, DRIVER, open_browser  # noqa: E402
from tests.warm import Warm  # noqa: E402


@pytest.fixture(autouse=True)
def same_signals():
    """Give every test pytest's signal handlers, so that a script's in this process do not affect later tests."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stopping.STATE.asked, stopping.STATE.held = 0, False  # else a test that was stopped ends pytest 25 seconds later


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("HPA_REAL_DATA")
    if not folder:
        pytest.skip("HPA_REAL_DATA is not set: no real images to test with")
    return Path(folder)


@pytest.fixture(scope="session")
def warm():
    """A Python that runs scripts, with the large packages already loaded."""
    python = Warm()
    yield python
    python.close()


@pytest.fixture(scope="session")
def run_script(warm, tmp_path_factory):
    """Return a function that runs a script of the project in its own process.

    It returns the finished process with its output as text. A Python script sees one core, so its default number of
    jobs is one: a test of several gives --jobs 2.
    """
    folder = tmp_path_factory.mktemp("output")

    def run(script, *arguments, check=True, env=None, **kwargs):
        command = [str(ROOT / script), *map(str, arguments)]
        environment = {**(env or os.environ), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        if script.endswith(".sh"):
            result = subprocess.run(
                ["bash", *command], cwd=ROOT, env=environment, capture_output=True, text=True, **kwargs
            )
        else:
            result = warm.run(command, {**environment, "LOKY_MAX_CPU_COUNT": "1"}, ROOT, folder)
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def run_stages(run_script):
    """Return a function that runs the commands of `run_all.sh --dry-run` in a warm Python, and returns their output."""

    def run(*flags):
        commands = run_script("run_all.sh", *flags, "--dry-run").stdout.splitlines()
        return "".join(run_script(*shlex.split(command)[1:]).stdout for command in commands)

    return run


@pytest.fixture(scope="session")
def real_run(run_stages, real_data, tmp_path_factory):
    """The work folder of a quick run on the 63 real samples, and the run's output."""
    work = tmp_path_factory.mktemp("real")
    return work, run_stages("--data", real_data / "kaggle_png", "--work", work, "--quick", "--pretrained", "none")


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, if this machine has one."""
    if not (CHROMIUM.is_file() and DRIVER.is_file()):
        pytest.skip(f"{CHROMIUM} or {DRIVER} is missing: no browser to check the page with")
    with open_browser() as driver:
        yield driver


@pytest.fixture
def fails(run_script):
    """Return a function that runs a script that must refuse (exit code 2, no traceback) and returns its message."""

    def run(script, *arguments):
        result = run_script(script, *arguments, check=False)
        assert result.returncode == 2, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result.stderr

    return run


def write_sample(folder: Path, Id: str, size: int = 160, seed: int = 0, dtype=np.uint8) -> None:
    """Write four channel files of smooth noise, so that they have texture at every scale."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, sum(map(ord, Id))])
    for colour in ("red", "green", "blue", "yellow"):
        coarse = rng.random((8, 8)).repeat(size // 8, axis=0).repeat(size // 8, axis=1)
        image = (coarse * 0.8 + rng.random(coarse.shape) * 0.2) * np.iinfo(dtype).max
        tifffile.imwrite(folder / f"{Id}_{colour}.tif", image.astype(dtype))


@pytest.fixture
def small_data(tmp_path) -> Path:
    """An input folder of 12 train and 3 test samples of 160 px with 3 classes."""
    data = tmp_path / "data"
    labels = ["0", "25", "0 25", "21"] * 3
    for i in range(12):
        write_sample(data / "train_full_size", f"train-{i}")
    for i in range(3):
        write_sample(data / "test_full_size", f"test-{i}")
    pd.DataFrame({"Id": [f"train-{i}" for i in range(12)], "Target": labels}).to_csv(data / "train.csv", index=False)
    pd.DataFrame({"Id": [f"test-{i}" for i in (2, 0, 1)], "Predicted": "0"}).to_csv(
        data / "sample_submission.csv", index=False
    )
    return data


def training_job(folder, recipe, fold=0, seed=0, on_nan="stop", label="test"):
    """Return a job of stage 04 that trains into `folder`, made from nothing in particular."""
    from common.artifacts.stage import Stage
    from common.train.jobs import Job

    return Job(folder, label, recipe, fold, Stage("04_train", folder / "best.pt", {}, {}), seed, on_nan=on_nan)
