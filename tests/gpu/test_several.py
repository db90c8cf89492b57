"""Several processes and several GPUs."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from common.train.run import new_run
from common.train.step import train_step
from tests.conftest import ROOT
from tests.gpu.helpers import RECIPES, drawn, noise, with_rates
from tests.slow.test_distributed import TORCHRUN, five_steps
from tests.slow.test_training import same


@pytest.fixture
def group(hardware, device, tmp_path):
    """A group of this process alone, over NCCL on a GPU."""
    hardware()  # takes the device
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_a_group_of_one_trains_and_talks(group, hardware, device):
    runs = [with_rates(new_run(RECIPES["sgd"], drawn(8, 64), hardware(), 0, 0)) for _ in range(2)]
    runs[1].network = DistributedDataParallel(runs[1].model, device_ids=[device] if device.type == "cuda" else None)
    for step in range(3):
        for run in runs:
            train_step(run, *noise(8, 64, device, step), 8, 0.5, step)
    assert same(*(run.model.state_dict() for run in runs))
    # What Team sends: tensors on the device, and plain types.
    values = torch.arange(3.0, device=device)
    parts, objects, box = [torch.empty_like(values)], [None], [{"a": 1}]
    distributed.all_gather(parts, values)
    distributed.broadcast(values, 0)
    distributed.all_gather_object(objects, torch.ones(2))
    distributed.broadcast_object_list(box)
    assert parts[0].equal(values) and objects[0].equal(torch.ones(2)) and box == [{"a": 1}]


@pytest.mark.gpus(2)
def test_two_gpus_train_the_weights_of_one(tmp_path):
    (alone,) = five_steps(tmp_path / "alone", sys.executable, device="cuda")
    first, second = five_steps(tmp_path / "run", *TORCHRUN, device="cuda")
    for step, other, expected in zip(first["steps"], second["steps"], alone["steps"], strict=True):
        assert set(step["kept"].tolist()) == set(other["kept"].tolist()) == set(expected["kept"].tolist())
        torch.testing.assert_close(step["losses"], expected["losses"], rtol=1e-4, atol=1e-4)
    for name, weights in first["model"].items():
        torch.testing.assert_close(weights, alone["model"][name], rtol=1e-4, atol=1e-5)
        assert second["model"][name].equal(weights)


# Each GPU that a process has touched holds a context of it, hundreds of MB.
ONE_STEP = """
import torch
from common.train.hardware import HardwareOptions, choose_hardware
from common.train.loop import all_batches, train_epoch
from common.train.run import new_run
from tests.gpu.helpers import RECIPES, drawn

data = drawn(16, 64)
run = new_run(RECIPES["sgd"], data, choose_hardware(HardwareOptions("cuda:1", workers=0)), 0, 0)
train_epoch(run, data, all_batches(run, data), "test", lambda: None)
assert torch.cuda.memory_reserved(1) and not torch.cuda.memory_reserved(0)
print([k for k in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(k)])
"""


@pytest.mark.gpus(2)
def test_a_gpu_by_number_is_the_only_one_touched():
    result = subprocess.run(
        [sys.executable, "-c", ONE_STEP],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[1]", result.stdout + result.stderr
