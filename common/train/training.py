"""Train one fold: hard sampler, E-loss, layer groups, cosine cycles; checkpoints from which it goes on exactly."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch.nn.parallel import DistributedDataParallel

from common.artifacts.files import write_text
from common.artifacts.tables import write_csv
from common.classes import CLASS_NAMES, N_CLASSES
from common.data.class_weights import draw_weights, effective_number_weights
from common.errors import UserError, is_out_of_memory
from common.process import stopping
from common.process.progress import progress
from common.recipes import Recipe, to_dict
from common.score.metrics import macro_f1
from common.train.checkpoints import FORMAT, Writer, save_checkpoint, snapshot
from common.train.dataset import BATCH, Batch, EpochBatches, ImageSet, Sets, loader, on_device, whole_batches
from common.train.distributed import Team
from common.train.fold_data import FoldData
from common.train.hardware import Hardware, set_kernels
from common.train.losses import hard_samples, sample_losses
from common.train.muon import Muon
from common.train.networks import build_model, param_groups
from common.train.predict import Fitting, Normalisation, predict_logits, views
from common.train.schedules import (
    cosine_with_restarts,
    cycle_gain,
    exponential_range,
    has_diverged,
    one_cycle,
    plateau_halvings,
)
from common.train.telemetry import class_mix, sample_table, save_telemetry

CHECKPOINT_SECONDS = 300  # between checkpoints within an epoch
EPOCH_SECONDS = 10  # between checkpoints after epochs
FINDER_STEPS = 100  # of the learning rate finder, at most
CHECK_STEPS = 50  # between looks at the losses: each makes a GPU wait
ENOUGH_IMAGES = 8  # for BatchNorm, in each of several processes
MOST_RETURNS = 3  # to the last good state, each time with half the learning rates


class NotFinite(Exception):
    """The loss or a weight is no longer a finite number; `batch`: Ids and losses of the first such training batch, or of the
    validation samples that have such losses."""

    def __init__(self, where: str, batch: pd.DataFrame) -> None:
        super().__init__(where)
        self.batch = batch


# --- the state of a run ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training: what it works with (first part), and all that a checkpoint holds of it (second part)."""

    recipe: Recipe
    hardware: Hardware
    normalise: Normalisation
    class_weights: torch.Tensor  # (n_classes,) of the E-loss
    seed: int
    network: torch.nn.Module  # the model, wrapped where several processes train it

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ranking: torch.Tensor  # (2, n_rows, 3): in this epoch and in all; times ranked, times kept, sum of losses
    epoch: int = 0
    step: int = 0  # batches done in this epoch
    loss_sum: float = 0.0  # over those batches
    skipped: int = 0  # of those batches, for they overflowed in float16
    seconds: float = 0.0  # spent on this epoch
    best_score: float = -math.inf
    good: dict | None = None  # the state that this epoch began with, where the run may go back to it
    micro_batch: int | None = None  # images that are in memory at once; None = the whole batch
    start: str = ""  # what it started from, in words
    returns: list[str] = field(default_factory=list)  # where it went back to the last good state
    history: list[dict] = field(default_factory=list)
    class_mix: list[dict] = field(default_factory=list)
    fitting: Fitting = field(default_factory=Fitting)  # of the validation; not saved

    TENSORS = ("model", "optimizer", "scaler")
    PLACE = (
        "ranking",
        "epoch",
        "step",
        "loss_sum",
        "skipped",
        "seconds",
        "best_score",
        "micro_batch",
        "start",
        "returns",
        "history",
        "class_mix",
    )
    LATER = (
        "skipped",
    )  # of PLACE: what checkpoints of earlier versions lack, and keeps its default when one is restored

    def state(self) -> dict:
        return {
            **self.network_state(),
            **{name: getattr(self, name).state_dict() for name in self.TENSORS},
            **{name: getattr(self, name) for name in self.PLACE},
        }

    def restore(self, state: dict) -> None:
        """Take over a saved state; raises KeyError, RuntimeError or ValueError where it is another network's or lacks parts."""
        rows = self.ranking.shape
        for name in self.TENSORS:
            if state[name] or name != "scaler":  # empty where another precision needed none
                getattr(self, name).load_state_dict(state[name])
        for name in self.PLACE:
            if name in state or name not in self.LATER:
                setattr(self, name, state[name])
        self.micro_batch = self.hardware.micro_batch or self.micro_batch
        for parameter, values in self.optimizer.state.items():  # torch looks at neither, and ends the process later
            if any(
                value.ndim and value.shape != parameter.shape for value in values.values() if torch.is_tensor(value)
            ):
                raise ValueError("its optimizer is another network's")
        if self.ranking.shape != rows:
            raise ValueError(f"its ranking has the shape {tuple(self.ranking.shape)}, expected {tuple(rows)}")
        self.ranking = self.ranking.to(self.hardware.device)

    @property
    def valid_losses(self) -> list[float]:
        return [row["valid_loss"] for row in self.history if "valid_loss" in row]

    def network_state(self) -> dict:
        """Return what prediction needs: weights, normalisation, classes, and what tells that it is this project's."""
        return {
            "model": self.model.state_dict(),
            "mean": list(self.normalise.mean),
            "std": list(self.normalise.std),
            "classes": list(CLASS_NAMES),
            "recipe": to_dict(self.recipe),
            "format": FORMAT,
        }


def seed_torch(*numbers: int) -> None:
    """Seed torch from several numbers: random draws (weights, dropout) become a function of them."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    # torch.manual_seed without a GPU notes a traceback at each call, for a GPU that may yet come.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def new_run(
    recipe: Recipe,
    data: FoldData,
    hardware: Hardware,
    fold: int,
    seed: int,
    weights: dict | None = None,
    rates: tuple[float, ...] | None = None,
) -> Run:
    """Return a run at its very start; what `weights` does not give depends on seed and fold only.

    weights : pretrained parameters of the encoder; rates : top learning rates in place of the recipe's
    """
    set_kernels(hardware)
    device, team = hardware.device, hardware.team
    seed_torch(seed, fold)
    model = build_model(recipe, N_CLASSES, weights)
    if recipe.sync_batchnorm and team.size > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # The stubs know a device or a memory format, not both.
    network = model = model.to(device, memory_format=hardware.memory_format)  # type: ignore[call-overload]
    if team.size > 1:
        network = DistributedDataParallel(model, device_ids=[device] if hardware.is_gpu else None)
    if hardware.compiled:
        network = torch.compile(network)
    optimizer = build_optimizer(recipe, param_groups(model, rates or recipe.group_learning_rates))
    scaler = torch.amp.GradScaler(device.type, enabled=hardware.autocast == torch.float16)
    counts = effective_number_weights(data.counts, recipe.alpha, recipe.class_weights)
    return Run(
        recipe,
        hardware,
        data.normalisation,
        torch.tensor(counts, dtype=torch.float32, device=device),
        seed,
        network,
        model,
        optimizer,
        scaler,
        torch.zeros(2, len(data.train), 3, device=device),
        micro_batch=hardware.micro_batch,
    )


def build_optimizer(recipe: Recipe, groups: list[dict]) -> torch.optim.Optimizer:
    """Return SGD with momentum, or AdamW or Muon, which leave biases and normalisation layers without decay."""
    if recipe.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True)
        for (
            group
        ) in groups:  # torch leaves them unset where a first step overflows in float16, and uses them in the next
            for parameter in group["params"] if recipe.momentum else ():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    parts = [
        {
            **group,
            "params": [p for p in group["params"] if p.ndim == dimensions],
            "muon": dimensions == 4,
            "weight_decay": recipe.weight_decay if dimensions > 1 else 0.0,
        }
        for group in groups
        for dimensions in (4, 2, 1)
    ]  # convolutions, dense layers, biases and normalisation layers
    optimizer = Muon if recipe.optimizer == "muon" else torch.optim.AdamW
    return optimizer([part for part in parts if part["params"]], lr=0.0, betas=(recipe.momentum, 0.99), fused=True)


def check_team(recipe: Recipe, n_rows: int, hardware: Hardware) -> None:
    """Refuse several processes whose images are too few for BatchNorm, and warn where they are few: each normalises over its own."""
    size = hardware.team.size
    each = min(recipe.batch_size, n_rows) // size
    if size == 1 or recipe.pooling == "own":  # GapNet-PL has no BatchNorm
        return
    if recipe.sync_batchnorm and not hardware.is_gpu:
        raise UserError("sync_batchnorm works on GPUs only; leave it out, or train in one process")
    if each < 2 and not recipe.sync_batchnorm:
        raise UserError(
            f"a batch of {recipe.batch_size} leaves {size} processes {each} image each, and BatchNorm needs two; start fewer "
            "processes, or give a larger batch: --set batch_size=..."
        )
    if each < ENOUGH_IMAGES and not recipe.sync_batchnorm and hardware.team.is_main:
        print(
            f"warning: each of {size} processes normalises over {each} images only, which can cost much of the score; use --set "
            f"sync_batchnorm=true, a larger batch, or fewer processes",
            file=sys.stderr,
            flush=True,
        )


# --- one step ----------------------------------------------------------------------------------------------


@contextmanager
def frozen_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Keep the running statistics of normalisation layers as they are."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


def micro_batches(n: int, most: int | None, batch: int | None = None, processes: int = 1) -> list[slice]:
    """Return how n images are cut into parts of at most `most`, never one image alone: BatchNorm needs two.

    batch, processes : of n images in each of several processes, which must all have as many parts: those of the largest n
    """
    largest, smallest = -(-(batch or n) // processes), (batch or n) // processes
    parts = max(1, min(-(-largest // (most or largest)), smallest // 2))
    return [slice(n * k // parts, n * (k + 1) // parts) for k in range(parts)]


def train_step(
    run: Run, images: torch.Tensor, targets: torch.Tensor, n: int, share: float, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train on the hardest samples of one batch, in as many parts as memory asks for.

    images : (part, 4, h, w) uint8 and targets : (part, n_classes), this process's part of a batch of n
    Returns the losses of the whole batch (n,) and the indices of those that were trained on (K,), on the device.
    """
    targets = targets.to(run.hardware.device, non_blocking=True)
    while True:
        try:
            losses, kept = gradients(run, images, targets, n, share, step)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Handled outside, where the failed attempt's tensors are free. The optimizer has not touched a weight yet.
        run.micro_batch = smaller_micro_batch(run.micro_batch or len(images), run.hardware)
        torch.cuda.empty_cache()
    regularise(run)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return losses, kept


def smaller_micro_batch(micro_batch: int, hardware: Hardware) -> int:
    """Return half of a micro-batch that did not fit into memory, and say so; raises UserError where nothing fits."""
    half = micro_batch // 2
    if half < 2:
        raise UserError("two images do not fit into the GPU's memory; use a smaller crop: --set crop_size=...")
    if hardware.team.size > 1:  # the others wait in the middle of their step
        raise UserError(f"{micro_batch} images do not fit into the GPU's memory; start again with --micro-batch {half}")
    print(
        f"out of memory with {micro_batch} images at once: continuing with {half}; the batch keeps its size", flush=True
    )
    return half


def gradients(
    run: Run, images: torch.Tensor, targets: torch.Tensor, n: int, share: float, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the gradients of all parts of a batch; see `train_step`.

    The sampler ranks the whole batch of all processes. In several parts that takes a pass of its own, without
    gradients, with the same dropout and without a trace in the running statistics.
    """
    team, parts = run.hardware.team, micro_batches(len(images), run.micro_batch, n, run.hardware.team.size)

    def losses_of(k: int, network: torch.nn.Module) -> torch.Tensor:
        seed_torch(run.seed, 1, step, team.rank, k)
        with run.hardware.casting():
            inputs = run.normalise(images[parts[k]], run.hardware.device)
            logits = network(inputs.contiguous(memory_format=run.hardware.memory_format))
        return sample_losses(logits, targets[parts[k]], run.class_weights, run.recipe)

    before = [buffer.clone() for buffer in run.model.buffers()] if run.hardware.autocast == torch.float16 else []
    whole = losses_of(0, run.network) if len(parts) == 1 else None
    kept = torch.arange(n, device=targets.device)
    if share < 1:
        if whole is None:
            with torch.no_grad(), frozen_statistics(run.model):
                ranked = torch.cat(
                    [losses_of(k, run.model if team.size > 1 else run.network) for k in range(len(parts))]
                )
        else:
            ranked = whole.detach()
        kept = hard_samples(team.gather(ranked, n), share)
    factors = torch.zeros(n, device=targets.device).index_fill(0, kept, team.size / len(kept))[team.part(n)]

    run.optimizer.zero_grad(set_to_none=True)
    of_parts = []
    for k, part in enumerate(parts):
        # Gradients of several processes meet once, with the last part.
        with (
            cast(DistributedDataParallel, run.network).no_sync()
            if team.size > 1 and k < len(parts) - 1
            else nullcontext()
        ):
            part_losses = losses_of(k, run.network) if whole is None else whole
            run.scaler.scale((part_losses * factors[part]).sum()).backward()
        of_parts.append(part_losses.detach())
    losses = team.gather(torch.cat(of_parts), n)
    if before:
        keep_finite_statistics(run, before, losses)
    return losses, kept


def keep_finite_statistics(run: Run, before: list[torch.Tensor], losses: torch.Tensor) -> None:
    """Undo what a batch that overflowed in float16 did to running statistics; the scaler skips its step for the weights.

    before : the model's buffers before the batch
    """
    fine = losses.isfinite().all()
    for buffer, old in zip(run.model.buffers(), before, strict=True):
        buffer.copy_(torch.where(fine, buffer, old))


def regularise(run: Run) -> None:
    """Add the L1 penalty's gradient and limit the gradient's norm, where the recipe asks for it."""
    recipe = run.recipe
    if not recipe.l1 and not recipe.clip_norm:
        return
    run.scaler.unscale_(run.optimizer)
    for parameter in run.model.parameters():
        assert parameter.grad is not None
        parameter.grad.add_(parameter.detach().sign(), alpha=recipe.l1)
    if recipe.clip_norm:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm)


# --- epochs ------------------------------------------------------------------------------------------------


def learning_rate_factor(run: Run, step: int, steps: int) -> float:
    """Return the factor on the top learning rates at a step of the run with `steps` in an epoch."""
    recipe = run.recipe
    if recipe.schedule == "cycles":
        return cosine_with_restarts(step, recipe.cycle_epochs * steps)
    if recipe.schedule == "one-cycle":
        return one_cycle(step, recipe.epochs * steps, recipe.warmup_share)
    if recipe.schedule == "plateau":
        return 0.5 ** plateau_halvings(run.valid_losses, recipe.patience)
    return 1.0


def epoch_batches(run: Run, data: FoldData, epoch: int, start: int = 0) -> EpochBatches:
    """Return an epoch's batches from number `start` on."""
    return EpochBatches(
        len(data.train),
        run.recipe.batch_size,
        run.seed,
        epoch,
        start,
        run.hardware.team,
        draw_weights(data.train.targets, run.recipe.class_balance),
    )


def all_batches(run: Run, data: FoldData) -> Iterator[Batch]:
    """Return an iterator over every batch from the run's place on: the training batches of each epoch, and after them, where it is
    evaluated, those of its validation part.

    One loader makes them all, so that its processes and the batches that they have ready last from epoch to epoch.
    """
    epoch, step, recipe = run.epoch, run.step, run.recipe
    valid = part_of(data.valid, run.hardware.team)
    parts = whole_batches(valid, BATCH)

    def keys() -> Iterator[list]:
        for number in range(epoch, recipe.epochs):
            for batch in epoch_batches(run, data, number, step if number == epoch else 0):
                yield [(0, key) for key in batch]
            if is_evaluated(recipe, number):
                yield from ([(1, row) for row in rows] for rows in parts)

    return on_device(
        loader(Sets((data.train, valid)), run.hardware.workers, run.hardware.is_gpu, keys()), run.hardware.device
    )


def part_of(dataset: ImageSet, team: Team) -> ImageSet:
    """Return this process's part of a set."""
    part = team.part(len(dataset))
    return replace(
        dataset,
        ids=dataset.ids[part],
        targets=dataset.targets[part],
        sides=None if dataset.sides is None else dataset.sides[part],
    )


def train_epoch(run: Run, data: FoldData, feed: Iterator[Batch], label: str, save: Callable[[], object]) -> None:
    """Work through the rest of the run's current epoch; calls `save` now and then. Raises NotFinite.

    feed : iterator over its batches; see `all_batches`
    """
    recipe, hardware, team = run.recipe, run.hardware, run.hardware.team
    batches = epoch_batches(run, data, run.epoch)
    order = torch.from_numpy(batches.order).to(hardware.device)
    share = 1.0 if run.epoch < recipe.hard_warmup_epochs else recipe.hard_share
    loss_sum = torch.tensor(run.loss_sum, dtype=torch.float64, device=hardware.device)
    skipped = torch.tensor(run.skipped, device=hardware.device)
    started = saved = time.monotonic()
    before, unread = run.seconds, []
    slower = 0.5 ** len(run.returns)
    run.model.train()
    for images, targets in progress(
        islice(feed, batches.steps - run.step),
        batches.steps,
        label,
        unit="batches",
        initial=run.step,
        quiet=not team.is_main,
    ):
        step = run.epoch * batches.steps + run.step
        for group in run.optimizer.param_groups:
            group["lr"] = slower * group["top_lr"] * learning_rate_factor(run, step, batches.steps)
        losses, kept = train_step(run, images, targets, batches.batch, share, step)
        unread.append(losses)
        if hardware.autocast == torch.float16:  # the scaler skips a step that overflowed
            skipped += ~losses.isfinite().all()
            losses = losses.nan_to_num(0.0, 0.0, 0.0)
        loss_sum += losses[kept].mean()
        if share < 1:
            note_ranking(run, order[run.step * batches.batch : (run.step + 1) * batches.batch], losses, kept)
        run.step += 1
        run.seconds = before + time.monotonic() - started
        ends = run.step == batches.steps
        if ends or run.step % CHECK_STEPS == 0:
            check_finite(run, data, batches, unread)
            unread = []
        if ends or stopping.STATE.asked or time.monotonic() - saved > CHECKPOINT_SECONDS:
            run.loss_sum, run.skipped = loss_sum.item(), int(skipped.item())
            stopping.check()
            if not ends:
                save()
            saved = time.monotonic()


def check_finite(run: Run, data: FoldData, batches: EpochBatches, losses: list[torch.Tensor]) -> None:
    """Raise NotFinite if a loss of the last steps, (batch,) each, or any weight now, is not finite."""
    stacked = torch.stack(losses)
    fine = torch.cat([stacked.isfinite().all(dim=1), finite_weights(run)]).tolist()
    if run.hardware.autocast == torch.float16:
        fine = without_overflows(fine, len(losses), run.step)
    if all(fine):
        return
    step = run.step - len(losses) + min(fine.index(False), len(losses) - 1)
    rows = batches.rows(step)
    batch = pd.DataFrame({"Id": data.train.ids[rows], "loss": losses[step - run.step].tolist()})
    raise NotFinite(f"epoch {run.epoch + 1}, batch {step + 1} of {batches.steps}", batch)


def without_overflows(fine: list[bool], steps: int, epoch_steps: int) -> list[bool]:
    """Pass over single steps whose losses overflowed in float16, which the scaler skipped.

    fine : whether the losses of each of the last `steps` are finite, then whether each weight is
    epoch_steps : steps of this epoch so far. Where all of an epoch's, or CHECK_STEPS in a row, overflowed, that is no odd batch.
    """
    if not any(fine[:steps]) and steps in (CHECK_STEPS, epoch_steps):
        return fine
    return [True] * steps + fine[steps:]


def finite_weights(run: Run) -> torch.Tensor:
    """Tell of each parameter whether all its weights are finite numbers, (n_parameters,) on the device."""
    # A NaN is both of a tensor's ends, an infinity one of them; `isfinite` on every weight takes ten times as long.
    ends = [torch.stack(parameter.detach().aminmax()) for parameter in run.model.parameters()]
    return torch.stack(ends).isfinite().all(dim=1)


def note_ranking(run: Run, rows: torch.Tensor, losses: torch.Tensor, kept: torch.Tensor) -> None:
    """Count for the batch's rows that they were ranked, whether they were kept, and their losses."""
    counts = torch.stack([torch.ones_like(losses), torch.zeros_like(losses).index_fill(0, kept, 1.0), losses], dim=1)
    run.ranking.index_add_(1, rows, counts.expand(2, -1, -1))  # a row may be in a batch twice


def close_ranking(run: Run, data: FoldData, epoch: int) -> None:
    """Turn the epoch's counts of the hard sampler into a class mix, and begin to count anew."""
    ranked, kept, _ = run.ranking[0].cpu().numpy().T
    if ranked.any():
        run.class_mix += class_mix(epoch, data.train.targets, ranked, kept)
    run.ranking[0] = 0


def evaluate(run: Run, data: FoldData, feed: Iterator[Batch]) -> tuple[float, float]:
    """Return the mean E-loss and the macro F1 at 0.5 on the whole validation images; raises NotFinite."""
    team, valid = run.hardware.team, data.valid
    team.share_buffers(run.model)
    logits = predict_logits(
        run.model, run.normalise, part_of(valid, team), run.hardware, views("none"), feed=feed, fitting=run.fitting
    )
    logits = team.gather_rows(logits[0])
    losses = sample_losses(logits, torch.from_numpy(valid.targets), run.class_weights.cpu(), run.recipe)
    wrong = ~losses.isfinite()
    if wrong.any():
        raise NotFinite(
            f"the validation of epoch {run.epoch + 1}",
            pd.DataFrame({"Id": valid.ids[wrong.numpy()], "loss": losses[wrong].tolist()}),
        )
    return losses.double().mean().item(), macro_f1(valid.targets, (logits > 0).numpy())


def is_finished(run: Run) -> bool:
    """Tell whether training is over: at the recipe's maximum, or when it hardly improves the validation loss any more.

    Cycles end with one that gains too little; halving ends on the plateau after the last of the halvings that the recipe allows.
    """
    recipe = run.recipe
    if run.epoch == 0 or run.step:
        return False
    if run.epoch == recipe.epochs:
        return True
    if recipe.schedule == "plateau":
        return 0 < recipe.max_halvings < plateau_halvings(run.valid_losses, recipe.patience)
    if recipe.schedule == "one-cycle" or run.epoch % recipe.cycle_epochs:
        return False
    return cycle_gain(run.valid_losses, evaluations_per_cycle(recipe)) < recipe.min_cycle_gain


def is_evaluated(recipe: Recipe, epoch: int) -> bool:
    """Tell whether the validation part is looked at after this epoch, counted from 0."""
    place = epoch % recipe.cycle_epochs + 1
    return place % recipe.evaluate_epochs == 0 or place == recipe.cycle_epochs


def evaluations_per_cycle(recipe: Recipe) -> int:
    return sum(is_evaluated(recipe, epoch) for epoch in range(recipe.cycle_epochs))


# --- whole folds -------------------------------------------------------------------------------------------


def train_fold(
    run: Run,
    folder: Path,
    data: FoldData,
    made_from: dict,
    label: str,
    on_nan: str = "stop",
    note: Callable[[dict], None] | None = None,
) -> Run:
    """Train a run until its cycles are over.

    made_from : what the run depends on; saved in every checkpoint
    on_nan : stop, or go back to the state that the epoch began with, with half the learning rates
    note : function that is given each epoch's row of the log as well
    Writes last.pt (everything), best.pt (network of the best epoch by macro F1 at 0.5), log.jsonl, and what the
    hard sampler did (see `telemetry`); a thread writes while training goes on.
    Raises UserError when the loss stops being finite, Stopped after a last checkpoint when SIGTERM has come.
    """
    recipe, is_main = run.recipe, run.hardware.team.is_main
    best, feed = None, all_batches(run, data)
    saved = time.monotonic()

    with Writer() as writer, stopping.held():

        def save() -> bool:
            nonlocal best, saved
            if not is_main or not math.isfinite(run.loss_sum) or not finite_weights(run).all():
                return False
            state = {**snapshot(run.state()), "made_from": made_from, **({"good": run.good} if run.step else {})}
            samples = None
            if run.class_mix:
                samples = sample_table(data.train.ids, data.train.targets, *run.ranking[1].cpu().numpy().T)
            writer.start(partial(write_state, folder, state, best, samples))
            best, saved = None, time.monotonic()
            return True

        while not is_finished(run):
            if on_nan == "stop":
                run.good = None
            elif not (run.good and run.step):
                run.good = snapshot(run.state())
            try:
                train_epoch(run, data, feed, f"{label} epoch {run.epoch + 1}/{recipe.epochs}", save)
                row = close_epoch(run, data, feed)
            except NotFinite as error:
                go_back(run, error, folder, label)
                feed = all_batches(run, data)
                continue
            except stopping.Stopped:
                if save():
                    writer.wait()
                    print(f"{label}: saved in epoch {run.epoch + 1} after batch {run.step}", flush=True)
                raise
            if note:
                note(row)
            if "macro_f1" in row and row["macro_f1"] > run.best_score:
                run.best_score, best = row["macro_f1"], snapshot(run.network_state())
            if is_finished(run) or time.monotonic() - saved > EPOCH_SECONDS:
                save()
            if "macro_f1" in row:
                print(describe_epoch(run, row, label), flush=True)
    return run


def describe_epoch(run: Run, row: dict, label: str) -> str:
    return (
        f"{label}: epoch {row['epoch']}/{run.recipe.epochs}, loss {row['train_loss']:.3f} (valid "
        f"{row['valid_loss']:.3f}), macro F1 {row['macro_f1']:.3f}, best {run.best_score:.3f}, {row['seconds'] + row['valid_seconds']:.1f} s"
    )


def go_back(run: Run, error: NotFinite, folder: Path, label: str) -> None:
    """Put a run back to its last good state, to go on with half the learning rates; without one, or too often, UserError.

    Writes bad_batch.csv, the Ids and losses of the batch.
    """
    found = f"{label}: the loss is not finite in {error}, whose Ids and losses are in {folder / 'bad_batch.csv'}"
    if run.hardware.team.is_main:
        write_csv(folder / "bad_batch.csv", error.batch)
    returns = [*run.returns, str(error)]
    if run.good is None or len(returns) > MOST_RETURNS:
        tried = f", after it went back {MOST_RETURNS} times" if run.good else ""
        raise UserError(
            f"{found}{tried}; lower the learning rates with --set learning_rates=... and train anew with --force"
            + ("" if run.good else ", or go on with --on-nan back")
        )
    run.restore(snapshot(run.good))
    run.returns = returns
    print(
        f"{found}: going back to the beginning of epoch {run.epoch + 1} with {0.5 ** len(returns):g} of the learning rates",
        flush=True,
    )


def write_state(folder: Path, state: dict, best: dict | None, samples: pd.DataFrame | None) -> None:
    """Write what belongs to a state of a run, and last.pt after it: killed in between, its epochs are done again."""
    if best:
        save_checkpoint(folder / "best.pt", best)
    if state["history"]:
        write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state["history"]))
    if samples is not None:
        save_telemetry(folder, state["class_mix"], samples)
    save_checkpoint(folder / "last.pt", state)


def close_epoch(run: Run, data: FoldData, feed: Iterator[Batch]) -> dict:
    """Evaluate where the recipe says so, and go to the next epoch; returns the finished one's row of the log.

    Raises NotFinite for the loss of the validation samples.
    """
    recipe = run.recipe
    row = {
        "epoch": run.epoch + 1,
        "cycle": run.epoch // recipe.cycle_epochs + 1,
        "learning_rate": run.optimizer.param_groups[-1]["lr"],
        "train_loss": run.loss_sum / max(1, run.step - run.skipped),
        "seconds": round(run.seconds, 2),
        "hardware": str(run.hardware),
        **({} if run.epoch else {"start": run.start}),
    }
    if is_evaluated(recipe, run.epoch):
        started = time.monotonic()
        row["valid_loss"], row["macro_f1"] = evaluate(run, data, feed)
        row["valid_seconds"] = round(time.monotonic() - started, 2)
    if run.skipped:
        row["skipped"] = run.skipped
    if run.returns:
        row["returns"] = list(run.returns)
    close_ranking(run, data, row["epoch"])
    run.history.append(row)
    run.epoch, run.step, run.loss_sum, run.skipped, run.seconds = run.epoch + 1, 0, 0.0, 0, 0.0
    return row


# --- learning rate finder ----------------------------------------------------------------------------------


def lr_range_test(
    data: FoldData,
    recipe: Recipe,
    hardware: Hardware,
    fold: int,
    seed: int,
    weights: dict | None = None,
    n_steps: int = FINDER_STEPS,
    low: float = 1e-5,
    high: float = 10.0,
    label: str = "learning rates",
) -> tuple[list[float], list[float]]:
    """Train a fresh network while the learning rate grows per batch from `low` to `high`; stop when it diverges.

    The rate is that of the last layer group; the others keep their ratio to it. Returns rates and losses.
    """
    run = new_run(recipe, data, hardware, fold, seed, weights)
    rates: list[float] = []
    losses: list[float] = []
    keys = (batch for epoch in count() for batch in epoch_batches(run, data, epoch))
    feed = on_device(loader(data.train, hardware.workers, hardware.is_gpu, islice(keys, n_steps)), hardware.device)
    n = epoch_batches(run, data, 0).batch
    run.model.train()
    for images, targets in progress(feed, n_steps, label, unit="batches", quiet=not hardware.team.is_main):
        stopping.check()  # a worker process that trains notes signals only
        rates.append(exponential_range(len(rates), n_steps, low, high))
        for group in run.optimizer.param_groups:
            group["lr"] = rates[-1] * group["top_lr"] / run.optimizer.param_groups[-1]["top_lr"]
        losses.append(train_step(run, images, targets, n, 1.0, len(rates))[0].mean().item())
        if has_diverged(losses):
            break
    return rates, losses
