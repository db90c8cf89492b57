"""The single checks: their lines for good and bad machines, folders and recipes."""

import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from common.check import checks, costs, estimates, lines, machine, trainings
from common.check.costs import Cost
from common.check.inputs import Seen
from common.check.lines import FAILS, FINE, WARNING, Check
from common.data.ingest import Plan, with_sizes
from common.data.options import IngestOptions
from common.data.samples import Sample
from common.errors import UserError
from common.process.main import OUT_OF_MEMORY
from common.recipes import get_recipe
from common.train import networks, pretrained

GB = 10**9
COST = Cost(parameters=10**6, images=2, steps=3, train=1.0, predict=0.5, fixed=12 * 10**6, activations=GB)


def found(check):
    """Return a check's lines and its return value."""
    lines = []
    while True:
        try:
            lines.append(next(check))
        except StopIteration as stop:
            return lines, stop.value


def test_a_line_has_state_name_what_was_found_and_below_it_the_cure():
    assert str(Check("disk", FINE, "enough")) == "fine       disk                   enough"
    assert str(Check("disk", FAILS, "two\nlines", "fix")).splitlines() == [
        "will fail  disk                   two",
        " " * 34 + "lines",
        " " * 34 + "-> fix",
    ]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("no train.csv"), "no train.csv"),
        (ModuleNotFoundError(name="cv2"), "the package cv2 cannot be imported"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), OUT_OF_MEMORY),
    ],
)
def test_what_ends_a_check_is_its_last_line(error, told):
    def check():
        yield Check("a", FINE, "before")
        raise error

    lines, value = found(checks.guarded("a", check()))
    assert [line.state for line in lines] == [FINE, FAILS] and lines[1].found == told and value is None


def test_missing_packages_fail_and_other_versions_warn(monkeypatch):
    monkeypatch.setattr(
        checks,
        "unmet",
        lambda files: [
            "numpy: expected >=9, found 2.0",
            "scipy: expected >=1, found nothing",
            "python: expected 3.11 or later, found 3.9",
        ],
    )
    lines, _ = found(checks.packages())
    assert [line.state for line in lines] == [WARNING, FAILS, FAILS] and "-m pip install -r" in lines[1].cure


def test_a_gpu_without_driver_or_that_cannot_add_is_told(monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr("common.train.hardware.nvidia_driver", lambda: "535.1")
    line = machine.try_gpu(0)
    assert line.state == FAILS and "cannot be used" in line.found and "535.1" in line.cure
    gpu = next(line for line in found(machine.hardware())[0] if line.name == "GPU")
    assert gpu.state == WARNING and "torch" in gpu.found and "update the driver" in gpu.cure


def test_shared_memory_is_for_three_batches_a_loader_process():
    recipe = get_recipe("resnet50")
    needed = 3 * 8 * 74 * 4 * 512**2
    assert machine.shared_memory(recipe, 8, needed, "a").state == FINE
    whole = 3 * 8 * 32 * 4 * 1024**2  # images for validation take more than crops here
    assert machine.shared_memory(get_recipe("resnet50", ["size_rule=by-source"]), 8, whole - 1, "a").state == WARNING
    line = machine.shared_memory(recipe, 8, 200 * 2**20, "a")
    assert line.state == WARNING and line.found == "8 loader processes need 1.9 GB of /dev/shm, 0.2 GB are free"
    assert "will start 0; make it larger" in line.cure and "--shm-size" in line.cure


@pytest.mark.parametrize(
    ("free", "state", "told"),
    [(112, FINE, "a batch of 74 fits"), (50, FAILS, "--micro-batch 32"), (2, FAILS, "use a smaller crop")],
)
def test_a_batch_must_fit_into_memory(monkeypatch, free, state, told):
    monkeypatch.setattr(costs, "measure", lambda recipe: COST)
    monkeypatch.setattr(costs, "free_memory", lambda hardware: free * GB)
    (line, *_), cost = found(
        machine.memory("resnet50", get_recipe("resnet50"), SimpleNamespace(work=Path("w"), data=Path("d")))
    )
    assert line.state == state and told in line.found + line.cure and cost == COST


def input_of(work=Path("work"), n=10):
    samples = [Sample("s0", "test", "", side=2048), *(Sample(f"s{k}", "train", "0") for k in range(1, n))]
    plan = Plan(work, IngestOptions({"resnet50": get_recipe("resnet50")}), samples)
    return Seen(with_sizes(plan), 0.1, {"resnet50": 0.01})


FOLDS = pd.DataFrame({"Id": [f"s{k}" for k in range(1, 10)], "Target": "0", "fold": [0, 1, 2] * 3, "copies": 1})


@pytest.mark.parametrize(("free", "state"), [(1000, FINE), (0.07, WARNING), (0.01, FAILS)])
def test_the_disk_must_hold_images_and_networks(monkeypatch, tmp_path, free, state):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free * GB))
    args = SimpleNamespace(work=tmp_path / "not" / "yet", folds=None)
    (line,), _ = found(estimates.disk(args, input_of(args.work), FOLDS, {"resnet50": COST}))
    assert line.state == state and "stored images 9 MB, networks 60 MB" in line.found, line
    assert line.found.endswith(f"free in {tmp_path}")


def test_time_is_scaled_from_what_was_measured(monkeypatch):
    recipe = get_recipe("resnet50", ["batch_size=2", "cycle_epochs=2", "max_cycles=3", "finder=off"])
    # 6 training rows in 3 batches of 2, 6 epochs: 36 images at 1 s, read at 0.1 s once; 3 validated 6 times at 0.5 s.
    assert costs.training_seconds(recipe, COST, FOLDS, 0, 0.1, 100) == pytest.approx(36 + 0.6 + 3 * 6 * 0.5)
    # A separate pass for the sampler, and the finder.
    assert costs.training_seconds(recipe, COST, FOLDS, 0, 0.1, 1) == pytest.approx(36 * 4 / 3 + 0.6 + 9)
    recipe = get_recipe("resnet50", ["batch_size=2", "cycle_epochs=2", "max_cycles=3"])
    assert costs.training_seconds(recipe, COST, FOLDS, 0, 0, 100) == pytest.approx(100 * 2 + 36 + 9)

    monkeypatch.setattr(costs, "cores", lambda: 2)
    args = SimpleNamespace(folds=[0, 1], tta="dihedral", no_test=False)
    told = {line.name: line.found for line in found(estimates.times(args, input_of(), FOLDS, {"resnet50": COST}))[0]}
    assert told["time, 01 and 02"].startswith("0 s: 10 samples at 0.100 s")
    assert told["time, 05 resnet50"].startswith("32 s: 8 images x 8 views")  # 6 of two folds, one test sample twice


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 hours"), (216000, "2.5 days")]
)
def test_times_are_told_in_the_unit_that_suits(seconds, text):
    assert lines.duration(seconds) == text


def killed(recipe):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_step_that_is_killed_for_want_of_memory_is_told(monkeypatch):
    monkeypatch.setattr(costs, "measure_here", killed)
    with pytest.raises(UserError) as error:
        costs.measure(get_recipe("demo"))
    for part in ("a step of two 128 px images was killed", "memory", "--set crop_size=..."):
        assert part in str(error.value)


def test_weights_that_nobody_hands_out_are_a_warning_with_the_file_to_save(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "answers", lambda url: False)
    (line,), _ = found(trainings.weights(SimpleNamespace(pretrained="auto", weights_dir=tmp_path), input_of()))
    assert line.state == WARNING and line.found.startswith("resnet50: the published weights are not available")
    assert "starts from random weights" in line.found
    published = networks.ENCODERS["resnet50"].weights
    assert line.cure == f"save {published.urls[0]} as {tmp_path / published.file}"


def test_a_step_is_measured_and_memory_grows_with_the_images():
    cost = costs.measure_here(get_recipe("demo", ["size_divisor=12", "batch_size=4"]))
    assert cost.images == 4 and cost.train > 0 and cost.predict > 0 and cost.parameters == 382204
    assert cost.fixed == pytest.approx(3 * 4 * 382204)  # weights, gradients, momentum
    larger = costs.measure_here(get_recipe("demo", ["size_divisor=6", "batch_size=4"]))
    assert 2.5 < larger.activations / cost.activations < 4.5  # four times the pixels
    assert costs.batch_that_fits(cost, cost.fixed + 500_000_000 + int(1.5 * 5 * cost.activations) + 9) == 5
