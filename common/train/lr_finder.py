"""The learning rate finder: a range test on a fresh network, its curve, and the rates that it suggests."""

import math
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.files import writing
from common.artifacts.layout import Layout
from common.artifacts.tables import write_csv
from common.process import stopping
from common.process.progress import progress
from common.train.dataset import loader, on_device
from common.train.fold_data import FoldData, load_fold
from common.train.hardware import Hardware
from common.train.jobs import Job, training_hardware
from common.train.run import Run, epoch_batches, new_run
from common.train.schedules import (
    centred,
    exponential_range,
    has_diverged,
    steepest_learning_rate,
    suggest_learning_rate,
)
from common.train.step import train_step

FINDER_STEPS = 100  # at most


def find_lr(job: Job) -> None:
    """Run the finder on a fold and save its curve: a job of stage 04 with --find-lr."""
    data = load_fold(job.work, Layout(job.work).read_folds(), job.fold, job.recipe, job.start.normalisation)
    hardware = training_hardware(job)
    with job.stage.lock() if hardware.team.is_main else nullcontext():
        found_rates(job, data, hardware, job.start.read(job.recipe))


def found_rates(job: Job, data: FoldData, hardware: Hardware, weights: dict | None) -> tuple[float, ...]:
    """Save the finder's curve and return the learning rates to train with: from its suggestion, or the recipe's."""
    run = new_run(job.recipe, data, hardware, job.fold, job.seed, weights)
    rates, losses = lr_range_test(run, data, label=f"{job.label} learning rates")
    groups = job.recipe.group_learning_rates
    if not math.isfinite(losses[0]):  # training starts with the same batch, and handles it
        print(
            f"{job.label}: the loss is not finite from the very first batch, so no learning rate can be found",
            flush=True,
        )
        return groups
    curve = save_lr_curve(job.folder, rates, losses) if hardware.team.is_main else (math.nan, math.nan)
    suggestion, steepest = hardware.team.agree(curve)
    is_used = job.recipe.finder == "use"
    if is_used:
        groups = tuple(suggestion * rate / groups[-1] for rate in groups)
    used, origin = ", ".join(f"{rate:.2g}" for rate in groups), "from the finder" if is_used else "of the recipe"
    print(
        f"{job.label}: highest learning rate at which the loss still falls: {suggestion:.2g}, at which it falls "
        f"fastest: {steepest:.2g}; learning rates {used} ({origin}); curve: {job.folder / 'lr_find.png'}",
        flush=True,
    )
    return groups


def lr_range_test(
    run: Run,
    data: FoldData,
    n_steps: int = FINDER_STEPS,
    low: float = 1e-5,
    high: float = 10.0,
    label: str = "learning rates",
) -> tuple[list[float], list[float]]:
    """Train a fresh run with a learning rate that grows per batch from `low` to `high`; stop when it diverges.

    The rate is that of the last layer group; the others keep their ratio to it. Returns rates and losses.
    """
    hardware, groups = run.hardware, run.optimizer.param_groups
    rates: list[float] = []
    losses: list[float] = []
    keys = (batch for epoch in count() for batch in epoch_batches(run, data, epoch))
    feed = on_device(loader(data.train, hardware.workers, hardware.is_gpu, islice(keys, n_steps)), hardware.device)
    n = epoch_batches(run, data, 0).batch
    run.model.train()
    for images, targets in progress(feed, n_steps, label, unit="batches", quiet=not hardware.team.is_main):
        stopping.check()  # a worker process that trains only records signals
        rates.append(exponential_range(len(rates), n_steps, low, high))
        for group in groups:
            group["lr"] = rates[-1] * group["top_lr"] / groups[-1]["top_lr"]
        losses.append(train_step(run, images, targets, n, 1.0, len(rates))[0].mean().item())
        if has_diverged(losses):
            break
    return rates, losses


def save_lr_curve(folder: Path, rates: list[float], losses: list[float]) -> tuple[float, float]:
    """Write lr_find.csv and lr_find.png; returns the learning rates at which the loss is lowest and falls fastest."""
    from matplotlib.figure import Figure

    lowest, steepest, curve = (
        suggest_learning_rate(rates, losses),
        steepest_learning_rate(rates, losses),
        centred(losses),
    )
    write_csv(
        folder / "lr_find.csv", pd.DataFrame({"learning_rate": rates, "loss": losses, "smoothed": pd.Series(curve)})
    )
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="0.75", label="loss of the batch")
    axes.plot(rates[: len(curve)], curve, color="C0", label="smoothed")
    axes.axvline(lowest, color="C1", linestyle="--", label=f"lowest {lowest:.2g}")
    axes.axvline(steepest, color="C2", linestyle=":", label=f"steepest {steepest:.2g}")
    axes.set(
        xscale="log",
        xlabel="learning rate of the head (per batch, growing)",
        ylabel="training loss",
        ylim=(0, 1.1 * max(losses[0], np.median(losses))),
    )
    axes.legend()
    with writing(folder / "lr_find.png") as temporary:
        figure.savefig(temporary, dpi=120)
    return lowest, steepest
