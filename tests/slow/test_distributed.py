import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.train.dataset import EpochBatches
from common.train.distributed import Team
from tests.conftest import ROOT

SCRIPT = ROOT / "tests" / "slow" / "five_steps.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def five_steps(path: Path, *launcher, micro_batch=0, device="cpu") -> list[dict]:
    """Return what each process saved of its five steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, str(SCRIPT), str(path), str(micro_batch), device], check=True, env=environment, cwd=ROOT)
    return [
        torch.load(file, map_location="cpu", weights_only=True) for file in sorted(path.parent.glob(f"{path.name}.*"))
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return five_steps(tmp_path_factory.mktemp("alone") / "run", sys.executable)[0]


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_two_processes_train_the_weights_of_one(tmp_path, alone, micro_batch):
    first, second = five_steps(tmp_path / "run", *TORCHRUN, micro_batch=micro_batch)
    for mine in (first, second):
        for step, expected in zip(mine["steps"], alone["steps"], strict=True):
            assert step["kept"].equal(expected["kept"]) and len(step["kept"]) == 7  # of the whole batch of 11
            torch.testing.assert_close(step["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
        for name, weights in mine["model"].items():
            torch.testing.assert_close(weights, alone["model"][name], rtol=1e-4, atol=1e-6)
    assert all(second["model"][name].equal(weights) for name, weights in first["model"].items())
    start = five_steps(tmp_path / "again", sys.executable)[0]["model"]
    assert all(start[name].equal(weights) for name, weights in alone["model"].items())


@pytest.mark.parametrize(("n", "size"), [(74, 8), (7, 3), (4, 4), (10, 1)])
def test_parts_of_a_team_are_whole_and_even(n, size):
    parts = [range(n)[Team(rank, size).part(n)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_teams_batches_are_those_of_one_process():
    whole = list(EpochBatches(50, 11, seed=3, epoch=2))
    parts = [list(EpochBatches(50, 11, seed=3, epoch=2, team=Team(rank, 2))) for rank in range(2)]
    for one, two, both in zip(*parts, whole, strict=True):
        assert [(row, *draw) for row, draw in one + two] == [(row, *draw) for row, draw in both]
    batches = EpochBatches(50, 11, seed=3, epoch=2)
    assert [row for row, _ in whole[1]] == batches.rows(1).tolist()


def test_more_processes_than_samples_in_a_batch_are_refused():
    with pytest.raises(UserError, match="a batch of 3 samples cannot be shared by 4 processes; start fewer"):
        EpochBatches(3, 8, seed=0, epoch=0, team=Team(0, 4))
