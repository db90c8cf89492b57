"""Machines with GPUs, simulated on one without: what is chosen, what is refused, and what is said."""

import os
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError, is_out_of_memory
from common.process import parallel
from common.process.main import OUT_OF_MEMORY, explain
from common.recipes import get_recipe
from common.train import hardware
from common.train.hardware import (
    Hardware,
    HardwareOptions,
    batch_bytes,
    choose_hardware,
    fit_shared_memory,
    plan_hardware,
)
from common.train.run import check_team

NO_KERNELS = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be ..."


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that makes this a machine with GPUs, and says which were set as this process's own."""

    def simulate(count=1, bf16=True, cores=16, kernel=lambda device: None):
        chosen = []
        for name, value in {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "set_device": chosen.append,
            "get_device_name": lambda device: "Some GPU",
            "get_device_capability": lambda device: (7, 5),
            "get_arch_list": lambda: ["sm_80", "sm_90"],
            "is_bf16_supported": lambda including_emulation=True: bf16 or including_emulation,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(hardware, "run_kernel", kernel)
        monkeypatch.setattr(hardware.joblib, "cpu_count", lambda: cores)
        return chosen

    return simulate


def arguments(**changes):
    return Namespace(
        **{
            "device": "auto",
            "precision": "auto",
            "workers": None,
            "jobs": None,
            "fast": False,
            "cluster": None,
            **changes,
        }
    )


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_bfloat16_is_for_gpus_that_multiply_it_themselves(gpus, bf16, expected):
    gpus(bf16=bf16)  # a T4 emulates it
    assert choose_hardware().autocast == expected and choose_hardware(training=False).autocast == expected
    assert choose_hardware(HardwareOptions(precision="fp32")).autocast is None


def test_a_card_without_kernels_is_one_message_with_the_cure(gpus):
    def fails(device):
        raise RuntimeError(NO_KERNELS)

    gpus(kernel=fails)
    with pytest.raises(UserError) as error:
        choose_hardware()
    assert str(error.value) == (
        f"torch {torch.__version__} has no kernels for cuda:0 (Some GPU, sm_75; it has them for sm_80, sm_90); "
        "install a release of torch for this GPU, or use --device cpu"
    )


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda:2", "this machine has cuda:0, cuda:1"),
        ("mps", "neither a CPU nor a CUDA GPU"),
        ("gpu", "device string: gpu"),
    ],
)
def test_devices_that_are_not_there_are_refused(gpus, device, reason):
    gpus(count=2)
    with pytest.raises(UserError, match=rf"device '{device}' cannot be used \(.*{reason}.*\); try --device cpu"):
        choose_hardware(HardwareOptions(device))


def test_a_gpu_by_number_is_the_only_one_that_this_process_uses(gpus):
    chosen = gpus(count=2)
    assert choose_hardware(HardwareOptions("cuda:1")).device == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]


def test_products_repeat_their_bits_in_whatever_process_takes_a_gpu(gpus, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    gpus(kernel=lambda device: os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" or pytest.fail("set too late"))
    choose_hardware()


@pytest.mark.parametrize(("device", "numbers"), [("auto", [0, 1, 0]), ("cuda", [0, 1, 0]), ("cuda:1", [1, 1, 1])])
def test_worker_processes_take_turns_at_the_gpus(gpus, monkeypatch, device, numbers):
    gpus(count=2)
    found = []
    for number in range(3):
        monkeypatch.setattr(hardware, "worker_number", lambda number=number: number)
        found.append(choose_hardware(HardwareOptions(device)).device.index)
    assert found == numbers


def test_processes_of_torchrun_take_the_gpu_of_their_rank(gpus, monkeypatch):
    gpus(count=4)
    monkeypatch.setattr(hardware, "join_team", lambda device: "team")
    for name, value in {"WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    found = choose_hardware()
    assert found.device.index == 3 and found.workers == 4


def number_of_a_worker(_):
    return parallel.worker_number(), os.getpid()


def test_worker_processes_have_different_numbers():
    assert parallel.worker_number() is None
    found = {
        number for _, (number, _) in parallel.run_parallel(number_of_a_worker, [(k,) for k in range(12)], 2, "numbers")
    }
    assert found <= {0, 1} and 0 in found


@pytest.mark.parametrize(
    ("count", "changes", "jobs", "workers"),
    [
        (0, {}, 1, 0),
        (1, {}, 1, 16),
        (4, {}, 4, 4),
        (4, {"jobs": 8}, 8, 2),
        (4, {"device": "cuda:2"}, 1, 16),
        (2, {"device": "cpu"}, 1, 0),
        (4, {"workers": 3}, 4, 3),
        (0, {"jobs": -1}, 10, 0),
        (32, {}, 10, 1),
    ],
)
def test_a_job_has_a_gpu_of_its_own_and_its_share_of_the_cores(gpus, capsys, count, changes, jobs, workers):
    gpus(count=count)
    options, found = plan_hardware(arguments(**changes), "04_train", 10)
    assert (options.jobs, found.workers) == (jobs, workers)
    line = capsys.readouterr().out
    assert line.startswith(f"04_train: {jobs} jobs at once" if jobs > 1 else "04_train: ") and line.count("\n") == 1


def test_one_line_says_what_networks_run_on_and_the_record_says_the_same(gpus, monkeypatch):
    gpus(bf16=False)
    found = choose_hardware(HardwareOptions(workers=4, fast=True))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert str(found) == f"Some GPU (cuda:0), float16, 4 loader processes, torch {torch.__version__}, CUDA 12.8, fast"
    assert found.record() == {
        "device": "Some GPU (cuda:0)",
        "precision": "float16",
        "workers": 4,
        "processes": 1,
        "torch": str(torch.__version__),
        "cuda": "12.8",
        "kernels": "fast",
    }
    assert ", no loader processes, " in str(choose_hardware(HardwareOptions("cpu"))) and "deterministic" in str(
        Hardware(torch.device("cpu"))
    )


@pytest.mark.parametrize(
    ("driver", "visible", "told"),
    [("560.1", None, True), (None, None, False), ("560.1", "", False), ("560.1", "-1", False), ("560.1", "0", True)],
)
def test_the_cpu_although_there_is_a_gpu_is_a_warning(gpus, monkeypatch, capsys, driver, visible, told):
    gpus(count=0)
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    plan_hardware(arguments(), "04_train", 1)
    assert ("warning: there is a GPU, but torch cannot use it" in capsys.readouterr().err) == told
    plan_hardware(arguments(device="cpu"), "04_train", 1)
    assert not capsys.readouterr().err  # as asked for


@pytest.mark.parametrize(
    ("training", "changes", "message"),
    [
        (True, {"jobs": 2}, "torchrun's processes train one fold together, so give no --jobs"),
        (True, {"cluster": "tcp://host:1"}, "torchrun's processes train one fold together"),
        (
            False,
            {},
            "this stage does not share its work among the processes of torchrun; start it without, with --jobs N",
        ),
    ],
)
def test_torchrun_is_for_one_training_on_several_gpus(monkeypatch, training, changes, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=message):
        plan_hardware(arguments(**changes), "stage", 4, training)


def team_of(size, device="cuda"):
    return SimpleNamespace(team=SimpleNamespace(size=size, is_main=True), is_gpu=device == "cuda")


def test_processes_with_few_images_are_warned_and_with_one_refused(capsys):
    recipe = get_recipe("resnet50")  # 74 in a batch
    for size, rows in ((1, 74), (8, 74), (9, 74)):
        check_team(recipe, rows, team_of(size))
        assert not capsys.readouterr().err
    check_team(recipe, 74, team_of(10))
    assert "warning: each of 10 processes normalises over 7 images only" in capsys.readouterr().err
    with pytest.raises(UserError, match="a batch of 74 leaves 40 processes 1 image each, and BatchNorm needs two"):
        check_team(recipe, 74, team_of(40))
    synchronised = get_recipe("resnet50", ["sync_batchnorm=1"])
    check_team(synchronised, 74, team_of(40))
    check_team(get_recipe("gapnet_pl"), 128, team_of(100))  # it has no BatchNorm
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="sync_batchnorm works on GPUs only"):
        check_team(synchronised, 74, team_of(2, "cpu"))


@pytest.mark.parametrize(
    ("workers", "jobs", "free", "expected"),
    [(8, 1, 10**9, 3), (2, 1, 10**9, 2), (8, 2, 10**9, 1), (8, 1, 10**7, 0), (0, 1, 0, 0)],
)
def test_as_many_loader_processes_as_shared_memory_has_room_for(monkeypatch, capsys, workers, jobs, free, expected):
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = fit_shared_memory(Hardware(torch.device("cpu"), workers=workers), HardwareOptions(jobs=jobs), 10**8)
    assert found.workers == expected
    err = capsys.readouterr().err
    assert ("docker run --shm-size" in err) == (expected < workers)
    if expected < workers:
        with pytest.raises(UserError, match=f"not for {workers}; give it more .* or --workers {expected}"):
            fit_shared_memory(
                found.__class__(torch.device("cpu"), workers=workers),
                HardwareOptions(workers=workers, jobs=jobs),
                10**8,
            )


def test_a_batch_takes_the_bytes_of_its_crops_or_of_whole_images():
    assert batch_bytes(get_recipe("resnet50"), 74) == 74 * 4 * 512**2
    assert batch_bytes(get_recipe("resnet50"), 0) == 32 * 4 * 768**2
    assert batch_bytes(get_recipe("resnet50", ["size_rule=by-source"]), 0, 8) == 8 * 4 * 1024**2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_full_gpu_is_known_by_whatever_says_so(error, expected):
    assert is_out_of_memory(error) == expected
    assert (explain(error) == OUT_OF_MEMORY) == expected


def test_fast_kernels_are_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only: calls.append(on))
    for fast in (True, False):
        hardware.set_kernels(Hardware(torch.device("cpu"), fast=fast))
        assert torch.backends.cudnn.benchmark == torch.backends.cudnn.allow_tf32 == fast
    assert calls == [False, True]
