"""Train one fold, from scratch or from its last checkpoint: epochs, validation, checkpoints that resume exactly."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch

from common.artifacts.files import write_text
from common.artifacts.layout import Layout
from common.artifacts.stage import Record
from common.artifacts.tables import write_csv
from common.errors import UserError
from common.process import stopping
from common.process.progress import progress
from common.recipes import Recipe
from common.score.metrics import class_f1, macro_f1
from common.score.thresholds import cross_fit
from common.train.checkpoints import (
    Writer,
    check_recipe,
    check_unfinished,
    load_checkpoint,
    relabel,
    restoring,
    save_checkpoint,
    snapshot,
)
from common.train.dataset import (
    BATCH,
    Batch,
    EpochBatches,
    ImageSet,
    Normalisation,
    Sets,
    loader,
    on_device,
    whole_batches,
)
from common.train.distributed import Team
from common.train.fold_data import FoldData, load_fold, training_inputs
from common.train.hardware import Hardware, memory_mib, reset_peak_memory
from common.train.jobs import Job, training_hardware
from common.train.losses import class_mix, sample_losses, sample_table, save_telemetry
from common.train.lr_finder import found_rates
from common.train.predict import predict_logits, views
from common.train.run import Run, check_team, epoch_batches, new_run
from common.train.schedules import has_ended, is_evaluated, rate_factor
from common.train.step import train_step
from common.train.trackers import Tracked, tracking

CHECKPOINT_SECONDS = 300  # between checkpoints within an epoch
EPOCH_SECONDS = 10  # between checkpoints after epochs
CHECK_STEPS = 50  # between two readings of the losses: each makes a GPU wait
MOST_RETURNS = 3  # to the last good state, each time with half the learning rates


class NotFinite(Exception):
    """The loss or a weight is no longer a finite number.

    batch : Ids and losses of the first such training batch, or of the validation samples that have such losses
    """

    def __init__(self, where: str, batch: pd.DataFrame) -> None:
        super().__init__(where)
        self.batch = batch


# --- a job -------------------------------------------------------------------------------------------------


def train_job(job: Job) -> None:
    """Train one fold, resuming from its last checkpoint, and seal it; in this process or a worker.

    If another process is already training the fold, wait for it. Several processes of torchrun do not wait: they would
    lose their connection.
    """
    hardware = training_hardware(job)
    team, stage = hardware.team, job.stage
    with stage.lock(wait=team.size == 1) if team.is_main else nullcontext():
        if team.agree(team.is_main and stage.is_current()):  # another process has trained it meanwhile
            return stage.say_current()
        if team.is_main:
            check_unfinished(stage)
        folds = Layout(job.work).read_folds()
        data = load_fold(job.work, folds, job.fold, job.recipe, job.start.normalisation)
        # The job may have waited for days.
        stage.check_unchanged({**training_inputs(job.work, folds, job.recipe), **job.start.inputs()})
        check_team(job.recipe, len(data.train), hardware)
        reset_peak_memory(hardware.device)
        run = begin_fold(job, data, hardware)
        if run.continued and team.is_main:
            relabel(job.folder / "best.pt", job.recipe)
        tracked = Tracked(job.work, job.folder, job.label, stage.parameters)
        with tracking(job.track if team.is_main else (), tracked, run.history) as note:
            train_fold(run, job, data, note)
        if team.is_main:
            # The rest is not sealed: last.pt may be deleted to free its space.
            stage.seal(Record(len(data.train), [job.folder / "log.jsonl"], sealed_with(run)))


def begin_fold(job: Job, data: FoldData, hardware: Hardware) -> Run:
    """Return a fold's run: as last.pt saved it, or at its start, with the learning rates that were found."""
    path = job.folder / "last.pt"
    if path.is_file():
        saved = load_checkpoint(path)
        check_recipe(path, saved, job.recipe)
        run = new_run(job.recipe, data, hardware, job.fold, job.seed)
        with restoring(path):
            run.restore(saved)
        run.good = saved.get("good")
        run.normalise = Normalisation(tuple(saved["mean"]), tuple(saved["std"]))
        place = f"epoch {run.epoch + 1}" + (f", batch {run.step + 1}" if run.step else "")
        print(f"{job.label}: resuming at {place}", flush=True)
        return run
    print(f"{job.label}: {job.start.describe()}", flush=True)
    weights, rates = job.start.read(job.recipe), job.recipe.group_learning_rates
    if job.recipe.finder != "off":
        rates = found_rates(job, data, hardware, weights)
    run = new_run(job.recipe, data, hardware, job.fold, job.seed, weights, rates)
    run.start = job.start.describe()
    run.start_file = job.stage.way_to(job.start.file) if job.start.file else ""
    return run


def sealed_with(run: Run) -> dict:
    """Return the notes for a finished training's sidecar."""
    return {
        "epochs": run.epoch,
        "train_seconds": round(sum(row["seconds"] + row.get("valid_seconds", 0) for row in run.history), 1),
        "score_best": run.best_score,
        "start": run.start,
        "start_file": run.start_file,
        "hardware": run.hardware.record(),
        "returns": run.returns,
        "mean": list(run.normalise.mean),
        "std": list(run.normalise.std),
        "learning_rates": [group["top_lr"] for group in run.optimizer.param_groups],
    }


# --- a fold ------------------------------------------------------------------------------------------------


def train_fold(run: Run, job: Job, data: FoldData, note: Callable[[dict], None] | None = None) -> Run:
    """Train a run until its schedule is over.

    note : function that also gets each epoch's row of the log
    Writes last.pt (everything), best.pt (network of the best epoch by macro F1 at 0.5), log.jsonl, and what the
    hard sampler did (see `losses.sample_table`); a thread writes while training continues.
    Raises UserError when the loss stops being finite; Stopped, after a last checkpoint, on SIGTERM.
    """
    feed = all_batches(run, data)
    with Saver(run, job, data) as saver, stopping.held():
        while not is_finished(run):
            keep_good_state(run, job)
            try:
                label = f"{job.label} epoch {run.epoch + 1}/{run.recipe.epochs}"
                train_epoch(run, data, feed, label, saver.save)
                row = close_epoch(run, data, feed)
            except NotFinite as error:
                go_back(run, error, job)
                feed = all_batches(run, data)
                continue
            except stopping.Stopped:
                saver.save_before_the_end()
                raise
            if note:
                note(row)
            saver.after_epoch(row)
            if "macro_f1" in row:
                print(describe_epoch(run, row, job.label), flush=True)
    return run


def keep_good_state(run: Run, job: Job) -> None:
    """Keep the state at the start of an epoch, if the job may return to it."""
    if job.on_nan == "stop":
        run.good = None
    elif not (run.good and run.step):
        run.good = snapshot(run.state())


class Saver:
    """Writes a run's state while training continues: last.pt, best.pt, the log, and the hard sampler's statistics."""

    def __init__(self, run: Run, job: Job, data: FoldData) -> None:
        self.run, self.job, self.data = run, job, data
        self.made_from = job.stage.made_from()  # saved in every checkpoint
        self.best: dict | None = None  # network to write to best.pt
        self.saved = time.monotonic()
        self.writer = Writer()

    def __enter__(self) -> Self:
        self.writer.__enter__()
        return self

    def __exit__(self, *error: type[BaseException] | None) -> None:
        self.writer.__exit__(*error)

    def save(self) -> bool:
        """Start to write a checkpoint; returns False if that is another process's task or a number is not finite."""
        run, train = self.run, self.data.train
        if not run.hardware.team.is_main or not math.isfinite(run.loss_sum) or not finite_weights(run).all():
            return False
        state = {**snapshot(run.state()), "made_from": self.made_from, **({"good": run.good} if run.step else {})}
        samples = None
        if run.class_mix:
            samples = sample_table(train.ids, train.targets, *run.ranking[1].cpu().numpy().T)
        self.writer.start(partial(write_state, self.job.folder, state, self.best, samples))
        self.best, self.saved = None, time.monotonic()
        return True

    def save_before_the_end(self) -> None:
        if self.save():
            self.writer.wait()
            print(f"{self.job.label}: saved in epoch {self.run.epoch + 1} after batch {self.run.step}", flush=True)

    def after_epoch(self, row: dict) -> None:
        """Keep the network of the best epoch; save now and then, and at the end."""
        run = self.run
        if "macro_f1" in row and row["macro_f1"] > run.best_score:
            trained_on = {"folds.csv": self.made_from["inputs"].get("folds.csv", ""), "fold": self.job.fold}
            run.best_score = row["macro_f1"]
            self.best = {**snapshot(run.network_state()), "trained_on": trained_on}
        if is_finished(run) or time.monotonic() - self.saved > EPOCH_SECONDS:
            self.save()


def write_state(folder: Path, state: dict, best: dict | None, samples: pd.DataFrame | None) -> None:
    """Write the files of a run's state, last.pt last: if it is killed in between, these epochs are trained again."""
    if best:
        save_checkpoint(folder / "best.pt", best)
    if state["history"]:
        write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state["history"]))
    if samples is not None:
        save_telemetry(folder, state["class_mix"], samples)
    save_checkpoint(folder / "last.pt", state)


def describe_epoch(run: Run, row: dict, label: str) -> str:
    seconds = row["seconds"] + row["valid_seconds"]
    return (
        f"{label}: epoch {row['epoch']}/{run.recipe.epochs}, loss {row['train_loss']:.3f} (valid "
        f"{row['valid_loss']:.3f}), macro F1 {row['macro_f1']:.3f}, best {run.best_score:.3f}, {seconds:.1f} s"
    )


def go_back(run: Run, error: NotFinite, job: Job) -> None:
    """Return a run to its last good state, to continue with half the learning rates.

    Writes bad_batch.csv, the Ids and losses of the batch.
    Raises UserError without such a state, or if this happens too often.
    """
    path = job.folder / "bad_batch.csv"
    found = f"{job.label}: the loss is not finite in {error}"
    where = f"its Ids and losses are in {path}"
    if run.hardware.team.is_main:
        write_csv(path, error.batch)
    returns = [*run.returns, str(error)]
    if run.good is None or len(returns) > MOST_RETURNS:
        tried = f", after it went back {MOST_RETURNS} times" if run.good else ""
        raise UserError(
            f"{found}{tried}; {where}. Lower the learning rates with --set learning_rates=... and train from scratch "
            f"with --force{'' if run.good else ', or resume with --on-nan back'}"
        )
    run.restore(snapshot(run.good))
    run.returns = returns
    print(
        f"{found}; {where}. Going back to the start of epoch {run.epoch + 1} with {0.5 ** len(returns):g} of the "
        "learning rates",
        flush=True,
    )


def is_finished(run: Run) -> bool:
    """Tell whether training is over: at the recipe's maximum, or when its schedule says so after an epoch."""
    if run.epoch == 0 or run.step:
        return False
    return has_ended(run.recipe, run.epoch, run.valid_losses, run.continued)


# --- an epoch ----------------------------------------------------------------------------------------------


def all_batches(run: Run, data: FoldData) -> Iterator[Batch]:
    """Return an iterator over all remaining batches of a run.

    Those are the training batches of each epoch, followed by its validation batches if the epoch is evaluated. One
    loader makes them all, so that its processes and the batches that they have ready last from epoch to epoch.
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
    """Train the rest of the run's current epoch; calls `save` now and then. Raises NotFinite.

    feed : iterator over its batches; see `all_batches`
    """
    batches = epoch_batches(run, data, run.epoch)
    order = torch.from_numpy(batches.order).to(run.hardware.device)
    share = hard_share(run.recipe, run.epoch)
    sums, saved, begun = Sums(run), time.monotonic(), time.monotonic() - run.seconds
    steps, n = batches.steps, batches.batch
    left = islice(feed, steps - run.step)
    run.model.train()
    for images, targets in progress(
        left, steps, label, unit="batches", initial=run.step, quiet=not run.hardware.team.is_main
    ):
        step = run.epoch * steps + run.step
        set_learning_rates(run, step, steps)
        losses, kept = train_step(run, images, targets, n, share, step)
        losses = sums.add(losses, kept)
        if share < 1:
            note_ranking(run, order[run.step * n : (run.step + 1) * n], losses, kept)
        run.step += 1
        run.seconds = time.monotonic() - begun
        ends = run.step == steps
        if ends or run.step % CHECK_STEPS == 0:
            check_finite(run, data, batches, sums.unread())
        if ends or stopping.STATE.asked or time.monotonic() - saved > CHECKPOINT_SECONDS:
            sums.read_into(run)
            stopping.check()
            if not ends:
                save()
            saved = time.monotonic()


def hard_share(recipe: Recipe, epoch: int) -> float:
    """Return the share of each batch that an epoch trains on: all of it while the hard sampler warms up."""
    return 1.0 if epoch < recipe.hard_warmup_epochs else recipe.hard_share


def set_learning_rates(run: Run, step: int, steps: int) -> None:
    """Give each layer group its learning rate at a step of the run with `steps` in an epoch, halved by each return."""
    slower, factor = 0.5 ** len(run.returns), learning_rate_factor(run, step, steps)
    for group in run.optimizer.param_groups:
        group["lr"] = slower * group["top_lr"] * factor


def learning_rate_factor(run: Run, step: int, steps: int) -> float:
    """Return the factor on the top learning rates at a step of the run with `steps` in an epoch."""
    return rate_factor(run.recipe, step, steps, run.valid_losses)


class Sums:
    """Sums over an epoch's steps, on the device: read now and then, since each reading makes a GPU wait."""

    def __init__(self, run: Run) -> None:
        device = run.hardware.device
        self.may_overflow = run.hardware.autocast == torch.float16
        self.losses = torch.tensor(run.loss_sum, dtype=torch.float64, device=device)
        self.skipped = torch.tensor(run.skipped, device=device)
        self.steps: list[torch.Tensor] = []

    def add(self, losses: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Add a step's losses, (batch,); returns them, 0 for those of a step that overflowed: the scaler skips it."""
        self.steps.append(losses)
        if self.may_overflow:
            self.skipped += ~losses.isfinite().all()
            losses = losses.nan_to_num(0.0, 0.0, 0.0)
        self.losses += losses[kept].mean()
        return losses

    def unread(self) -> list[torch.Tensor]:
        """Return the losses of the steps since the last call, (batch,) each."""
        steps, self.steps = self.steps, []
        return steps

    def read_into(self, run: Run) -> None:
        run.loss_sum, run.skipped = self.losses.item(), int(self.skipped.item())


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
    """Ignore single steps whose losses overflowed in float16; the scaler skipped them.

    fine : whether the losses of each of the last `steps` are finite, then whether each weight is
    epoch_steps : steps of this epoch so far
    If all steps of an epoch, or CHECK_STEPS in a row, overflowed, they are not ignored.
    """
    if not any(fine[:steps]) and steps in (CHECK_STEPS, epoch_steps):
        return fine
    return [True] * steps + fine[steps:]


def finite_weights(run: Run) -> torch.Tensor:
    """Tell for each parameter whether all its weights are finite, (n_parameters,) on the device."""
    # A NaN is both of a tensor's ends, an infinity one of them; `isfinite` on every weight takes ten times as long.
    ends = [torch.stack(parameter.detach().aminmax()) for parameter in run.model.parameters()]
    return torch.stack(ends).isfinite().all(dim=1)


def note_ranking(run: Run, rows: torch.Tensor, losses: torch.Tensor, kept: torch.Tensor) -> None:
    """Count that the batch's rows were ranked, which of them were kept, and add up their losses."""
    counts = torch.stack([torch.ones_like(losses), torch.zeros_like(losses).index_fill(0, kept, 1.0), losses], dim=1)
    run.ranking.index_add_(1, rows, counts.expand(2, -1, -1))  # a row may be in a batch twice


# --- after an epoch ----------------------------------------------------------------------------------------


def close_epoch(run: Run, data: FoldData, feed: Iterator[Batch]) -> dict:
    """Evaluate if the recipe says so, and move on to the next epoch; returns the finished epoch's row of the log.

    Raises NotFinite for the loss of the validation samples.
    """
    recipe = run.recipe
    row = {
        "epoch": run.epoch + 1,
        "cycle": run.epoch // recipe.cycle_epochs + 1,
        "learning_rate": run.optimizer.param_groups[-1]["lr"],
        "train_loss": run.loss_sum / max(1, run.step - run.skipped),
        "seconds": round(run.seconds, 2),
        "images_per_second": round(run.step * min(recipe.batch_size, len(data.train)) / max(run.seconds, 1e-3), 1),
        "hardware": str(run.hardware),
        **({} if run.epoch else {"start": run.start}),
    }
    if is_evaluated(recipe, run.epoch):
        started = time.monotonic()
        row |= evaluate(run, data, feed)
        row["valid_seconds"] = round(time.monotonic() - started, 2)
    row["memory_mib"] = memory_mib(run.hardware.device)
    if run.skipped:
        row["skipped"] = run.skipped
    if run.returns:
        row["returns"] = list(run.returns)
    close_ranking(run, data, row["epoch"])
    run.history.append(row)
    run.epoch, run.step, run.loss_sum, run.skipped, run.seconds = run.epoch + 1, 0, 0.0, 0, 0.0
    return row


def close_ranking(run: Run, data: FoldData, epoch: int) -> None:
    """Turn the epoch's counts of the hard sampler into a class mix, and count from 0 again."""
    ranked, kept, _ = run.ranking[0].cpu().numpy().T
    if ranked.any():
        run.class_mix += class_mix(epoch, data.train.targets, ranked, kept)
    run.ranking[0] = 0


def evaluate(run: Run, data: FoldData, feed: Iterator[Batch]) -> dict:
    """Return the mean loss and scores on the whole validation images, for the log; raises NotFinite.

    macro_f1, class_f1 : at 0.5, (28,); macro_f1_thresholds : with thresholds that were found on other images
    """
    team, valid = run.hardware.team, data.valid
    for network in dict.fromkeys((run.model, run.trained)):
        team.share_buffers(network)
    logits = predict_logits(
        run.trained, run.normalise, part_of(valid, team), run.hardware, views("none"), feed=feed, fitting=run.fitting
    )
    logits = team.gather_rows(logits[0])  # (n, n_classes)
    losses = sample_losses(logits, torch.from_numpy(valid.targets), run.class_weights.cpu(), run.recipe)  # (n,)
    wrong = ~losses.isfinite()
    if wrong.any():
        raise NotFinite(
            f"the validation of epoch {run.epoch + 1}",
            pd.DataFrame({"Id": valid.ids[wrong.numpy()], "loss": losses[wrong].tolist()}),
        )
    per_class = class_f1(valid.targets, (logits > 0).numpy())
    return {
        "valid_loss": losses.double().mean().item(),
        "macro_f1": float(per_class.mean()),
        "macro_f1_thresholds": score_with_thresholds(valid.targets, logits.sigmoid().numpy()),
        "class_f1": per_class.round(4).tolist(),
    }


def score_with_thresholds(targets: np.ndarray, probs: np.ndarray) -> float:
    """Return macro F1 of (n, 28) with the paper's thresholds, each fifth of the samples with those of the others."""
    if len(targets) < 2:
        return macro_f1(targets, probs >= 0.5)
    fifths = np.arange(len(targets)) % 5
    (predicted,) = cross_fit(targets, probs, fifths, "greedy", folds=[fifths])
    return macro_f1(targets, predicted)
