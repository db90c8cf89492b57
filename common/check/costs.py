"""What a recipe costs on this machine: a few real steps on random images, scaled up to whole runs."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common.classes import N_CLASSES
from common.errors import UserError
from common.recipes import Recipe
from common.train.dataset import CACHE_BYTES, EpochBatches, ImageSet, Normalisation, collate
from common.train.fold_data import FoldData, training_rows
from common.train.hardware import Fitting, Hardware, HardwareOptions, choose_hardware
from common.train.lr_finder import FINDER_STEPS
from common.train.predict import in_parts_that_fit
from common.train.run import Run, new_run
from common.train.schedules import evaluations_per_cycle
from common.train.step import train_step

SECONDS = 10  # of steps with the final number of images
ENOUGH = 3  # seconds of a step that is long enough to time; shorter steps get more images, up to the batch
# Memory of a step beyond the backward pass's, as measured on a CPU: with these, estimates are within 15 %.
OVERHEAD, LIBRARIES = 1.5, 5 * 10**8  # factor; bytes


@dataclass(frozen=True)
class Cost:
    """The time and memory that a recipe takes on this machine."""

    parameters: int
    images: int  # at once, in the timed steps
    steps: int  # timed
    train: float  # seconds per image and epoch, at the crop's size
    predict: float  # seconds per image and view, at the whole size
    fixed: int  # bytes of weights, gradients and the optimizer's state
    activations: int  # bytes that an image keeps in memory for the backward pass


def measure(recipe: Recipe) -> Cost:
    """Return a recipe's cost, measured in its own process, so that its memory is freed. Raises UserError."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure_here, recipe).result()
        except BrokenProcessPool:
            raise UserError(
                f"a step of two {recipe.crop} px images was killed, probably because memory ran out; use smaller "
                "crops: --set crop_size=..."
            ) from None


def measure_here(recipe: Recipe) -> Cost:
    """Time steps of stage 04 on more and more random images until one takes long enough, and prediction on as many."""
    hardware = choose_hardware()
    data = random_images(recipe)
    fold = FoldData(data, data, np.ones(N_CLASSES, dtype=int), Normalisation((0.1,) * 4, (0.1,) * 4))
    run = new_run(recipe, fold, hardware, 0, 0)
    run.model.train()
    activations = bytes_kept(run, data)
    n, most = 2, max(2, min(recipe.batch_size, int(free_memory(hardware) / 2 / activations)))
    while n < most and step_seconds(run, data, n) < ENOUGH:
        n = min(2 * n, most)
    train = timed(lambda: step_seconds(run, data, n))
    run.model.eval()
    predict = timed(lambda: predict_seconds(run, n))
    parameters = sum(p.numel() for p in run.model.parameters())
    states = sum(v.nbytes for state in run.optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    return Cost(
        parameters,
        n,
        len(train),
        float(np.median(train)) / n,
        float(np.median(predict)) / n,
        8 * parameters + states,
        activations,
    )


def random_images(recipe: Recipe) -> ImageSet:
    """Return two random images of a recipe's size as a training set, in memory."""
    rows = ImageSet(
        Path(), np.array(["a", "b"]), np.eye(2, N_CLASSES, dtype=bool), recipe.crop, augmentations=recipe.augmentations
    )
    for Id in rows.ids:
        pixels = np.random.default_rng(0).integers(256, size=(recipe.size, recipe.size, 4), dtype=np.uint8)
        rows.cache.keep(Id, pixels.transpose(2, 0, 1))
    return rows


def step_seconds(run: Run, data: ImageSet, n: int) -> float:
    """Return the seconds of a step of n images, including making the batch if no loader process does that."""
    started = time.perf_counter()
    images, targets = collate([data[k % 2, draw] for k, draw in enumerate(np.random.default_rng(0).random((n, 3)))])
    if run.hardware.workers:
        started = time.perf_counter()
    train_step(run, images, targets, n, run.recipe.hard_share, 0)[0].sum().item()
    return time.perf_counter() - started


@torch.inference_mode()
def predict_seconds(run: Run, n: int) -> float:
    images = torch.randint(0, 256, (n, 4, run.recipe.size, run.recipe.size), dtype=torch.uint8)
    hardware = choose_hardware(HardwareOptions(workers=0), training=False)

    def logits_of(part: torch.Tensor) -> torch.Tensor:
        with hardware.casting():
            return run.model(run.normalise(part, hardware.device)).float()[None]

    started = time.perf_counter()
    in_parts_that_fit(logits_of, images, Fitting()).sum().item()
    return time.perf_counter() - started


def timed(step: Callable[[], float]) -> list[float]:
    """Return the seconds of a few steps; the first, which includes setup, only if it took all the time."""
    seconds = [step()]
    while len(seconds) < 30 and sum(seconds) + seconds[-1] < SECONDS:
        seconds.append(step())
    return seconds[1:] or seconds


def bytes_kept(run: Run, data: ImageSet) -> int:
    """Return the bytes per image that a step keeps for its backward pass, without the weights."""
    weights = {tuple(sorted(p.shape)) for p in run.model.parameters()}  # also as autocast's copies, and transposed
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(sorted(tensor.shape)) not in weights:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step_seconds(run, data, 2)
    return sum(kept.values()) // 2


def free_memory(hardware: Hardware) -> int:
    """Return the free bytes of the device's memory; on a CPU, within the limit of this process's control group."""
    if hardware.is_gpu:
        return torch.cuda.mem_get_info(hardware.device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def batch_that_fits(cost: Cost, free: int) -> int:
    """Return about how many images a training step can have in `free` bytes."""
    return max(0, int((free - cost.fixed - LIBRARIES) / (OVERHEAD * cost.activations)))


def training_seconds(recipe: Recipe, cost: Cost, folds: pd.DataFrame, fold: int, read: float, fits: int) -> float:
    """Return the maximum seconds of training a fold: all epochs, their validation, and the finder.

    read : seconds to read a stored image; fits : images of a batch that are in memory at once
    """
    rows = folds["copies"].to_numpy()[training_rows(folds, fold)].sum()
    batches = EpochBatches(int(rows), recipe.batch_size, 0, 0)
    images, step = batches.steps * batches.batch, batches.batch * cost.train
    if batches.batch > fits and recipe.hard_share < 1:
        step *= 4 / 3  # the sampler ranks in a separate pass
    valid = (folds["fold"] == fold).sum() * cost.predict * evaluations_per_cycle(recipe) * recipe.max_cycles
    times_read = 1 if rows * 4 * recipe.size**2 <= CACHE_BYTES else recipe.epochs
    finder = FINDER_STEPS * step if recipe.finder != "off" else 0
    return recipe.epochs * batches.steps * step + valid + finder + times_read * images * read


def checkpoint_bytes(recipe: Recipe, cost: Cost) -> int:
    """Return the bytes on disk of a fold while last.pt is written: best.pt, last.pt and its next version."""
    last = cost.fixed - 4 * cost.parameters
    return 4 * cost.parameters + 2 * last


def cores() -> int:
    return len(os.sched_getaffinity(0))
