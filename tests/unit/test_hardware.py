"""Machines with GPUs, simulated on one without: what is chosen, what is refused, and what is said."""

import os
import warnings
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


def test_what_the_command_line_leaves_open_is_plain(gpus, capsys):
    gpus(count=0)
    options, found = plan_hardware(arguments(), "04_train", 1)
    assert options == HardwareOptions() == HardwareOptions("auto", "auto", None, None, False, "channels-last", False, 1)
    for plain in (found, choose_hardware(), Hardware(torch.device("cpu"))):
        assert (plain.workers, plain.micro_batch, plain.compiled, plain.fast) == (0, None, False, False)
        assert plain.memory_format == torch.channels_last


AMX, AVX = {"amx_bf16", "avx512_bf16"}, {"avx512_bf16"}


@pytest.mark.parametrize(
    ("flags", "name", "fast"),
    [
        (AMX, "Intel Xeon", True),
        ({"amx_bf16"}, "AMD", True),
        (AVX, "Intel Xeon", False),
        (AVX, "AMD EPYC", True),
        ({"avx2"}, "AMD EPYC", False),
        (set(), "", False),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_that_is_faster_and_predicts_in_32_bits(gpus, monkeypatch, flags, name, fast):
    gpus(count=0)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: (flags, name))
    assert choose_hardware().autocast == (torch.bfloat16 if fast else None)
    assert choose_hardware(training=False).autocast is None
    assert choose_hardware(HardwareOptions(precision="bf16"), training=False).autocast == torch.bfloat16


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


@pytest.mark.parametrize(
    ("count", "jobs", "line"),
    [
        (4, 8, "04_train: 8 jobs at once on 4 GPUs, each on Some GPU (cuda:0), "),
        (4, 3, "04_train: 3 jobs at once on 3 GPUs, each on Some GPU (cuda:0), "),
        (4, 2, "04_train: 2 jobs at once on 2 GPUs, each on Some GPU (cuda:0), "),
        (1, 2, "04_train: 2 jobs at once, each on Some GPU (cuda:0), "),
        (0, 2, "04_train: 2 jobs at once, each on CPU ("),
        (4, 1, "04_train: Some GPU (cuda:0), "),
    ],
)
def test_the_gpus_that_are_used_are_counted(gpus, capsys, count, jobs, line):
    gpus(count=count)
    plan_hardware(arguments(jobs=jobs), "04_train", 10)
    assert capsys.readouterr().out.startswith(line)


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


@pytest.mark.parametrize(("name", "told"), [("Some CPU", "Some CPU"), ("", "unknown")])
def test_a_cpu_has_its_name_and_its_cores(gpus, monkeypatch, name, told):
    gpus(count=0)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: (set(), name))
    assert hardware.device_name(torch.device("cpu")) == f"CPU ({told}, 16 cores)"


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
    ("program", "version"),
    [("echo 560.1; echo 560.2", "560.1"), ("echo ' 560.1 '", "560.1"), ("echo 560.1; exit 9", None), (None, None)],
)
def test_the_driver_is_asked_for_its_version(tmp_path, monkeypatch, program, version):
    monkeypatch.setenv("PATH", str(tmp_path))
    if program:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert hardware.nvidia_driver() == version


def test_why_a_gpu_is_idle(gpus, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: "560.1")
    gpus(count=1)
    assert hardware.idle_gpu() is None
    gpus(count=0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert hardware.idle_gpu() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert hardware.idle_gpu() == "torch finds no usable GPU"

    def unavailable():
        warnings.warn("CUDA initialization: the driver is too old\nand more", stacklevel=1)
        warnings.warn("another", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    assert hardware.idle_gpu() == "CUDA initialization: the driver is too old"


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


@pytest.mark.parametrize(
    ("jobs", "processes", "room", "expected"),
    [(1, 1, 7, 7), (1, 4, 28, 7), (2, 4, 56, 7), (1, 4, 27, 6), (1, 4, 32, 8), (1, 4, 40, 8), (2, 4, 7, 0)],
)
def test_jobs_and_processes_of_torchrun_share_the_memory(monkeypatch, jobs, processes, room, expected):
    """Of 8 loader processes each, of which one takes three batches of 1 MB; `room` for so many of them all in all."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=room * 3 * 10**6))
    wanted = Hardware(torch.device("cpu"), workers=8)
    assert fit_shared_memory(wanted, HardwareOptions(jobs=jobs), 10**6).workers == expected


def test_the_room_in_shared_memory_is_told_in_megabytes(monkeypatch, capsys):
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    fit_shared_memory(Hardware(torch.device("cpu"), workers=8), HardwareOptions(), 10**8)
    assert capsys.readouterr().err.startswith(
        f"warning: {hardware.SHARED_MEMORY} has 1000 MB free, enough for 3 loader processes with batches of 100 MB; "
        "using 3. For more, "
    )


def test_a_machine_without_shared_memory_keeps_its_loader_processes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hardware, "SHARED_MEMORY", tmp_path / "shm")
    wanted = Hardware(torch.device("cpu"), workers=8)
    assert fit_shared_memory(wanted, HardwareOptions(), 10**15) is wanted
    (tmp_path / "shm").mkdir()
    assert fit_shared_memory(wanted, HardwareOptions(), 10**15).workers == 0
    assert "warning: " in capsys.readouterr().err


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
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only: calls.append((on, warn_only)))
    for fast in (True, False):
        hardware.set_kernels(Hardware(torch.device("cpu"), fast=fast))
        assert torch.backends.cudnn.benchmark == torch.backends.cudnn.allow_tf32 == fast
        assert torch.backends.cuda.matmul.allow_tf32 == fast and not torch.utils.deterministic.fill_uninitialized_memory
    assert calls == [(False, True), (True, True)]  # what has no deterministic kernel warns only
