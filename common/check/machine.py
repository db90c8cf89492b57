"""Check processors, GPUs and memory before a run."""

import argparse
import shutil

import torch

from common.artifacts.layout import Layout
from common.check import costs
from common.check.lines import FAILS, FINE, WARNING, Check, Checks, gigabytes
from common.errors import UserError, first_line
from common.recipes import Recipe
from common.train import hardware as devices
from common.train.hardware import Hardware, choose_hardware


def hardware() -> Checks[None]:
    """Yield which GPUs there are and whether they work, and whether loader processes can pass on their batches."""
    cores, free = costs.cores(), costs.free_memory(Hardware(torch.device("cpu")))
    yield Check("processor", FINE, f"{cores} core{'s' * (cores > 1)}, {gigabytes(free)} of memory free")
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            yield try_gpu(k)
    elif reason := devices.idle_gpu():
        yield Check(
            "GPU",
            WARNING,
            f"there is one, but torch cannot use it ({reason})",
            f"update the driver to one for CUDA {torch.version.cuda or 'and install torch with CUDA'}",
        )
    else:
        yield Check("GPU", FINE, "none: everything runs on the CPU")
    if not choose_hardware(trial=False).workers:
        yield Check("shared memory", FINE, "not needed: on a CPU no loader processes are started")


def try_gpu(number: int) -> Check:
    """Tell whether a GPU runs this torch's kernels, and describe it."""
    driver = devices.nvidia_driver() or "unknown"
    try:
        devices.try_device(torch.device("cuda", number))
        left, whole = torch.cuda.mem_get_info(number)
    except (UserError, RuntimeError, AssertionError) as error:  # the last from a torch without CUDA
        return Check(
            "GPU",
            FAILS,
            first_line(error),
            f"install torch for this GPU and its driver ({driver}), or give stages 04 and 05 --device cpu",
        )
    return Check(
        "GPU",
        FINE,
        f"{torch.cuda.get_device_name(number)}, {gigabytes(left)} of {gigabytes(whole)} free, driver "
        f"{driver}, CUDA {torch.version.cuda}",
    )


def memory(name: str, recipe: Recipe, args: argparse.Namespace) -> Checks[costs.Cost]:
    """Yield whether a batch will fit into memory; returns the recipe's measured `Cost`."""
    hardware = choose_hardware()
    cost = costs.measure(recipe)
    free = costs.free_memory(hardware)
    fits = costs.batch_that_fits(cost, free)
    each = (
        f"about {gigabytes(cost.activations)} per image at {recipe.crop} px and {gigabytes(cost.fixed)} for the network"
        f", {gigabytes(free)} free on the {'GPU' if hardware.is_gpu else 'machine'}"
    )
    if fits >= recipe.batch_size:
        state, found, cure = FINE, f"a batch of {recipe.batch_size} fits", ""
    elif hardware.is_gpu and fits >= 2:
        state, cure = FINE, ""
        found = f"a batch of {recipe.batch_size} is split into parts of about {fits} images, which takes a third longer"
    else:
        state, found, cure = FAILS, f"a batch of {recipe.batch_size} is too large", smaller_batch(name, fits, args)
    yield Check(f"memory, {name}", state, f"{found}: {each}", cure)
    if hardware.workers:
        yield shared_memory(recipe, hardware.workers, shutil.disk_usage("/dev/shm").free, name)
    return cost


def smaller_batch(name: str, fits: int, args: argparse.Namespace) -> str:
    """Return what to do if only `fits` images of a batch fit into memory."""
    if fits < 2:
        return "use a smaller crop: --set crop_size=..., or another machine"
    train = Layout(args.work, args.data).command("04_train.py", "--recipe", name, "--micro-batch", fits)
    return f"train with: {train}, then continue with run_all.sh"


def shared_memory(recipe: Recipe, workers: int, free: int, name: str) -> Check:
    """Tell whether the batches that loader processes keep ready fit into shared memory."""
    batch = devices.batch_bytes(recipe, recipe.batch_size)
    fits, needed = devices.loaders_that_fit(free, batch), (devices.PREFETCHED + 1) * workers * batch
    found = f"{workers} loader processes need {gigabytes(needed)} of /dev/shm, {gigabytes(free)} are free"
    if fits >= workers:
        return Check(f"shared memory, {name}", FINE, found)
    return Check(
        f"shared memory, {name}",
        WARNING,
        found,
        f"stages 04 and 05 will start {fits}; make it larger (docker run --shm-size=16g), or loading may be slow",
    )
