"""Tests that need a GPU, and are skipped without one. HPA_GPU_TESTS=cpu runs on the CPU what does not need CUDA itself."""

import gc
import os

import pytest
import torch

from common.demo.data import make_demo_data
from common.train import loop
from common.train.hardware import HardwareOptions, choose_hardware, idle_gpu
from tests.conftest import ROOT
from tests.gpu.helpers import FEW_EPOCHS

ON_CPU = os.environ.get("HPA_GPU_TESTS") == "cpu"
GPUS = 0 if ON_CPU or not torch.cuda.is_available() else torch.cuda.device_count()


def pytest_configure(config):
    config.addinivalue_line("markers", "gpus(n): needs n GPUs, also with HPA_GPU_TESTS=cpu")


def pytest_collection_modifyitems(items):
    """Skip what this machine lacks the GPUs for, with the reason."""
    ours = [item for item in items if ROOT / "tests" / "gpu" in item.path.parents]
    reason = (
        f"torch finds no GPU ({idle_gpu() or 'there is none'}); HPA_GPU_TESTS=cpu runs what works without"
        if ours
        else ""
    )
    for item in ours:
        needed = max((mark.args[0] for mark in item.iter_markers("gpus")), default=0)
        if not GPUS and not ON_CPU:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif needed > GPUS:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU{'s' * (needed > 1)}, found {GPUS}"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if GPUS else torch.device("cpu")


@pytest.fixture(scope="session")
def hardware(device):
    """Function that returns the hardware of command line flags, on the device under test."""

    def choose(precision="fp32", workers=0, **more):
        return choose_hardware(HardwareOptions(str(device), precision, workers, **more))

    return choose


@pytest.fixture(autouse=True)
def tidy(monkeypatch):
    """Let a training write after every epoch; give back what earlier tests left in the GPU's memory."""
    monkeypatch.setattr(loop, "EPOCH_SECONDS", 0)
    gc.collect()
    if GPUS:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def work(run_script, device, tmp_path_factory):
    """The work folder of run_all.sh on a little demo data, two jobs at once with loader processes each; what it said, and
    a function that runs it again."""
    folder = tmp_path_factory.mktemp("gpu")
    make_demo_data(folder / "data", n_train=80, n_test=10)
    settings = [part for setting in FEW_EPOCHS for part in ("--set", setting)]

    def run_all() -> str:
        return run_script(
            "run_all.sh",
            "--data",
            folder / "data",
            "--work",
            folder / "work",
            "--recipes",
            "demo",
            "--folds",
            "0,1",
            "--device",
            device.type,
            "--jobs",
            2,
            "--workers",
            2,
            *settings,
            timeout=400,
        ).stdout

    return folder / "work", run_all(), run_all
