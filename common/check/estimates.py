"""The disk space and time that a run will take."""

import argparse
import shutil

import numpy as np
import pandas as pd

from common.artifacts.layout import Layout
from common.check import costs
from common.check.costs import Cost
from common.check.inputs import Seen
from common.check.lines import ESTIMATE, FAILS, FINE, WARNING, Check, Checks, duration, gigabytes
from common.check.work_folder import existing
from common.classes import N_CLASSES
from common.data import ingest
from common.data.folds import fold_numbers
from common.recipes import Recipe
from common.train.hardware import choose_hardware
from common.train.predict import views

PROBABILITIES = N_CLASSES * np.dtype(np.float32).itemsize  # bytes per sample


def disk(args: argparse.Namespace, seen: Seen, folds: pd.DataFrame, measured: dict[str, Cost]) -> Checks[None]:
    """Compare the disk space that the work folder will need, part by part, with what is free."""
    layout, numbers = Layout(args.work), args.folds or fold_numbers(folds)
    to_store = ingest.sides_to_store(ingest.with_lacking(seen.plan.recalled()))
    images = ingest.space_needed(to_store, seen.plan.options.raw)
    runs = sum(
        costs.checkpoint_bytes(seen.recipes[name], cost)
        for name, cost in measured.items()
        for fold in numbers
        if not layout.network(name, fold, "last").is_file()
    )
    predicted = len(measured) * PROBABILITIES * (len(folds) + (len(numbers) + 1) * len(seen.plan.usable))
    needed, free = images + runs + predicted, shutil.disk_usage(existing(args.work)).free
    found = (
        f"about {gigabytes(needed)} more are needed (stored images {gigabytes(images)}, networks {gigabytes(runs)}), "
        f"{gigabytes(free)} are free in {existing(args.work)}"
    )
    state = FAILS if needed > free else WARNING if needed > 0.9 * free else FINE
    yield Check("disk", state, found, "" if state == FINE else "free some space, or give another --work")


def times(args: argparse.Namespace, seen: Seen, folds: pd.DataFrame, measured: dict[str, Cost]) -> Checks[None]:
    """Estimate the time of each stage, as if nothing existed yet."""
    n, cores, hardware = len(seen.plan.usable), costs.cores(), choose_hardware()
    everything = seen.store_seconds * n / cores
    found = f"{duration(everything)}: {n} samples at {seen.store_seconds:.3f} s, {cores} at once"
    yield Check("time, 01 and 02", ESTIMATE, found)
    for name, cost in measured.items():
        read = seen.read_seconds[name] / max(1, hardware.workers)
        fits = costs.batch_that_fits(cost, costs.free_memory(hardware))
        numbers = args.folds or fold_numbers(folds)
        train = [costs.training_seconds(seen.recipes[name], cost, folds, fold, read, fits) for fold in numbers]
        yield training_line(name, seen.recipes[name], cost, train)
        predict, line = prediction_line(name, cost, predicted_images(args, seen, folds), read, args.tta)
        yield line
        everything += sum(train) + predict
    yield Check(
        "time, in all",
        ESTIMATE,
        f"{duration(everything)} at most, one fold after the other, on a "
        f"{hardware.device.type} as busy as it was now; training may end earlier",
    )


def training_line(name: str, recipe: Recipe, cost: Cost, seconds: list[float]) -> Check:
    """Describe the time of training; seconds : of each fold."""
    return Check(
        f"time, 04 {name}",
        ESTIMATE,
        f"{duration(sum(seconds))} at most: {len(seconds)} folds x {recipe.epochs} epochs, "
        f"{cost.train:.2g} s per image (median of {cost.steps} steps of {cost.images} images of {recipe.crop} px)",
    )


def predicted_images(args: argparse.Namespace, seen: Seen, folds: pd.DataFrame) -> int:
    """Return how many images the networks of all folds predict in total."""
    numbers = args.folds or fold_numbers(folds)
    n_test = 0 if args.no_test else sum(sample.part == "test" for sample in seen.plan.usable)
    return int(folds["fold"].isin(numbers).sum()) + n_test * len(numbers)


def prediction_line(name: str, cost: Cost, images: int, read: float, tta: str) -> tuple[float, Check]:
    """Return the seconds of predicting so many images, and their line; read : seconds to read a stored image."""
    looks = len(views(tta))
    seconds = images * (looks * cost.predict + read)
    found = f"{duration(seconds)}: {images} images x {looks} views at {cost.predict:.2g} s"
    return seconds, Check(f"time, 05 {name}", ESTIMATE, found)
