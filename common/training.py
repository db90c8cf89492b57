"""Train one fold: hard sampler, E-loss, layer groups, cosine cycles; checkpoints from which it goes on exactly."""

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common.artifacts import Stage, digest, read_json, read_table, sidecar, write_csv, write_text, writing
from common.classes import CLASS_NAMES, N_CLASSES
from common.data import EpochBatches, ImageSet, loader
from common.errors import UserError
from common.images import CHANNELS
from common.inference import Hardware, Normalisation, choose_hardware, predict_logits, views
from common.labels import parse_targets
from common.losses import effective_number_weights, hard_samples, sample_losses
from common.metrics import macro_f1
from common.models import build_model, param_groups
from common.progress import progress
from common.recipes import Recipe, from_dict
from common.schedules import (cosine_with_restarts, cycle_gain, exponential_range, has_diverged, smoothed,
                              suggest_learning_rate)

CHECKPOINT_SECONDS = 300  # within an epoch; a checkpoint is also written after each epoch


# --- what a fold is trained on -----------------------------------------------------------------------------

@dataclass(frozen=True)
class FoldData:
    """The images of one fold: training rows with copies, validation rows, class counts, normalisation."""
    train: ImageSet
    valid: ImageSet
    counts: np.ndarray  # (28,) distinct training samples of each class
    normalisation: Normalisation


def stored_images(work: Path, size: int, ids) -> pd.DataFrame:
    """Return stage 01's statistics of the given Ids at one size, in their order."""
    rerun = f"python 01_preprocess.py --work {work} --recipes RECIPE"
    table = read_table(work / "images" / f"{size}.csv", rerun).set_index("Id")
    missing = [Id for Id in ids if Id not in table.index]
    if missing:
        raise UserError(f"{work / 'images' / str(size)} lacks {len(missing)} samples, such as {missing[0]}; run: {rerun}")
    return table.loc[list(ids)].reset_index()


def known_folds(work: Path, folds: pd.DataFrame, numbers: list[int]) -> None:
    """Refuse fold numbers that stage 03's table does not have."""
    known = sorted(set(folds["fold"]) - {-1})
    for fold in numbers:
        if fold not in known:
            raise UserError(f"there is no fold {fold}; {work / 'folds.csv'} has the folds {', '.join(map(str, known))}")


def load_fold(work: Path, folds: pd.DataFrame, fold: int, recipe: Recipe, seed: int) -> FoldData:
    """Return the data of one fold of stage 03's table."""
    targets = parse_targets(folds["Target"])
    train, valid = (folds["fold"] != fold).to_numpy(), (folds["fold"] == fold).to_numpy()
    rows = np.repeat(np.flatnonzero(train), folds["copies"].to_numpy()[train])
    if len(rows) < 2:
        raise UserError(f"fold {fold} leaves {len(rows)} samples to train on; give more data or fewer folds")
    ids, folder = folds["Id"].to_numpy(), work / "images" / str(recipe.size)
    statistics = stored_images(work, recipe.size, ids[train])
    mean = [float(statistics[f"mean_{c}"].mean()) for c in CHANNELS]
    # The spread of all pixels together: within images and between them.
    std = [float(np.sqrt((statistics[f"std_{c}"] ** 2 + statistics[f"mean_{c}"] ** 2).mean() - m ** 2))
           for c, m in zip(CHANNELS, mean, strict=True)]
    return FoldData(ImageSet(folder, ids[rows], targets[rows], recipe.crop, seed),
                    image_set(work, recipe, folds[valid]), targets[train].sum(axis=0),
                    Normalisation(tuple(mean), tuple(max(value, 1e-3) for value in std)))


def training_inputs(work: Path, folds: pd.DataFrame, recipe: Recipe) -> dict:
    """Return the fingerprints of all that a training reads."""
    return {"folds.csv": work / "folds.csv",
            "images": digest(stored_images(work, recipe.size, folds["Id"]))}


def image_set(work: Path, recipe: Recipe, rows: pd.DataFrame) -> ImageSet:
    """Return the whole stored images of a table with Id and Target."""
    return ImageSet(work / "images" / str(recipe.size), rows["Id"].to_numpy(), parse_targets(rows["Target"]))


# --- the state of a run ------------------------------------------------------------------------------------

@dataclass
class Run:
    """All that a checkpoint holds: network, optimizer, place in the epoch, best score, one record per epoch."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0  # batches done in this epoch
    loss_sum: float = 0.0  # over those batches
    seconds: float = 0.0  # spent on this epoch
    best_score: float = -math.inf
    history: list[dict] = field(default_factory=list)

    PLACE = ("epoch", "step", "loss_sum", "seconds", "best_score", "history")

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), **{name: getattr(self, name) for name in self.PLACE}}

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in self.PLACE:
            setattr(self, name, state[name])


def save_checkpoint(path: Path, values: dict) -> None:
    with writing(path) as temporary:
        torch.save(values, temporary)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of tensors and plain types onto the CPU; no code in it is ever run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{path} is not a checkpoint that can be read ({str(error).splitlines()[0]}); "
                        "delete it and train the fold again") from None


def seed_torch(*numbers: int) -> None:
    """Seed torch from several numbers: random draws (weights, dropout) become a function of them."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def new_run(recipe: Recipe, hardware: Hardware, seed: int, fold: int) -> Run:
    """Return a run at its very start; its weights depend on seed and fold only."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    seed_torch(seed, fold)
    model = build_model(recipe, N_CLASSES).to(hardware.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(param_groups(model, recipe.group_learning_rates), lr=0.0,
                                momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.autocast == torch.float16)
    return Run(model, optimizer, scaler)


# --- training ----------------------------------------------------------------------------------------------

def train_step(run: Run, images, targets, weights, share: float, recipe: Recipe, hardware: Hardware) -> torch.Tensor:
    """Learn from the hardest samples of one batch; returns their mean loss, still on the device."""
    with hardware.casting():
        logits = run.model(images)
    losses = sample_losses(logits, targets, weights, recipe)
    loss = losses[hard_samples(losses, share)].mean()
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss.detach()


def train_epoch(run: Run, data: FoldData, weights, recipe: Recipe, hardware: Hardware, seed: int, label: str, save) -> None:
    """Go through the rest of the run's current epoch; calls `save` now and then."""
    batches = EpochBatches(len(data.train), recipe.batch_size, seed, run.epoch, start=run.step)
    share = 1.0 if run.epoch < recipe.hard_warmup_epochs else recipe.hard_share
    cycle_steps = recipe.cycle_epochs * batches.steps
    loss_sum = torch.tensor(run.loss_sum, dtype=torch.float64, device=hardware.device)
    started = saved = time.monotonic()
    before = run.seconds
    run.model.train()
    for images, targets in progress(loader(data.train, hardware.workers, hardware.is_gpu, batches), batches.steps,
                                    label, unit="batches", initial=run.step):
        step = run.epoch * batches.steps + run.step
        for group in run.optimizer.param_groups:
            group["lr"] = group["top_lr"] * cosine_with_restarts(step, cycle_steps)
        seed_torch(seed, 1, step)
        loss_sum += train_step(run, data.normalisation(images, hardware.device),
                               targets.to(hardware.device, non_blocking=True), weights, share, recipe, hardware)
        run.step += 1
        run.seconds = before + time.monotonic() - started
        if time.monotonic() - saved > CHECKPOINT_SECONDS and run.step < batches.steps:
            run.loss_sum = loss_sum.item()
            save()
            saved = time.monotonic()
    run.loss_sum = loss_sum.item()


def evaluate(run: Run, data: FoldData, weights, recipe: Recipe, hardware: Hardware) -> tuple[float, float]:
    """Return the mean E-loss and the macro F1 at 0.5 on the whole validation images."""
    logits = predict_logits(run.model, data.normalisation, data.valid, hardware, views("none"))[0]
    targets = torch.from_numpy(data.valid.targets)
    loss = sample_losses(logits, targets, weights.cpu(), recipe).double().mean().item()
    return loss, macro_f1(data.valid.targets, (logits > 0).numpy())


def class_weights(data: FoldData, recipe: Recipe, hardware: Hardware) -> torch.Tensor:
    weights = effective_number_weights(data.counts, recipe.alpha, recipe.class_weights)
    return torch.tensor(weights, dtype=torch.float32, device=hardware.device)


def is_finished(run: Run, recipe: Recipe) -> bool:
    """Tell whether the cycles are over: the recipe's maximum, or one that hardly improved the validation loss."""
    if run.epoch == 0 or run.epoch % recipe.cycle_epochs or run.step:
        return False
    if run.epoch == recipe.cycle_epochs * recipe.max_cycles:
        return True
    return cycle_gain([row["valid_loss"] for row in run.history], recipe.cycle_epochs) < recipe.min_cycle_gain


def train_fold(folder: Path, data: FoldData, recipe: Recipe, hardware: Hardware, fold: int, seed: int,
               made_from: dict, label: str) -> Run:
    """Train until the cycles are over, going on from `folder`/last.pt where there is one.

    made_from : what the run depends on; saved in every checkpoint
    Writes last.pt (everything), best.pt (network of the best epoch by macro F1 at 0.5), log.jsonl.
    Raises UserError when the loss stops being finite.
    """
    run = new_run(recipe, hardware, seed, fold)
    if (folder / "last.pt").is_file():
        run.restore(load_checkpoint(folder / "last.pt"))
        print(f"{label}: going on at epoch {run.epoch + 1}" + (f", batch {run.step + 1}" if run.step else ""))
    weights = class_weights(data, recipe, hardware)
    steps = EpochBatches(len(data.train), recipe.batch_size, seed, 0).steps
    epochs = recipe.cycle_epochs * recipe.max_cycles

    def save():
        save_checkpoint(folder / "last.pt", {**network_checkpoint(run, data), **run.state(), "made_from": made_from})

    while not is_finished(run, recipe):
        train_epoch(run, data, weights, recipe, hardware, seed, f"{label} epoch {run.epoch + 1}/{epochs}", save)
        started = time.monotonic()
        valid_loss, score = evaluate(run, data, weights, recipe, hardware)
        row = {"epoch": run.epoch + 1, "cycle": run.epoch // recipe.cycle_epochs + 1,
               "learning_rate": run.optimizer.param_groups[-1]["lr"], "train_loss": run.loss_sum / steps,
               "valid_loss": valid_loss, "macro_f1": score, "seconds": round(run.seconds, 1),
               "valid_seconds": round(time.monotonic() - started, 1)}
        if not math.isfinite(row["train_loss"]) or not math.isfinite(valid_loss):
            raise UserError(f"{label}: the loss is not finite in epoch {row['epoch']}; lower the learning rates with "
                            "--set learning_rates=... and train anew with --force")
        run.history.append(row)
        run.epoch, run.step, run.loss_sum, run.seconds = run.epoch + 1, 0, 0.0, 0.0
        if score > run.best_score:
            run.best_score = score
            save_checkpoint(folder / "best.pt", network_checkpoint(run, data))
        # The log comes before the checkpoint: killed in between, the epoch is done and written again.
        write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in run.history))
        save()
        print(f"{label}: epoch {row['epoch']}/{epochs}, loss {row['train_loss']:.3f} (valid {valid_loss:.3f}), "
              f"macro F1 {score:.3f}, best {run.best_score:.3f}, {row['seconds'] + row['valid_seconds']:.0f} s", flush=True)
    return run


def train_job(stage: Stage, work: Path, recipe: Recipe, fold: int, seed: int, hardware_flags: tuple, label: str) -> None:
    """Train one fold from what is on disk and seal it: one job of stage 04, in this process or a worker's."""
    folds = read_table(work / "folds.csv", "python 03_make_folds.py")
    data = load_fold(work, folds, fold, recipe, seed)
    folder = stage.artifact.parent
    run = train_fold(folder, data, recipe, choose_hardware(*hardware_flags), fold, seed, stage.made_from(), label)
    # last.pt is not sealed: whoever needs its space may delete it.
    stage.finish(rows=len(data.train), also=[folder / "log.jsonl"], epochs=run.epoch, score_best=run.best_score)


def prepare(stage: Stage, force: bool) -> None:
    """Refuse to overwrite or continue a run that was made from something else; clear it with `force`."""
    folder = stage.artifact.parent
    if force:
        shutil.rmtree(folder, ignore_errors=True)
        return
    cure = "use --force to throw it away and train anew, or another --work"
    if stage.sidecar.is_file():
        raise UserError(f"{folder} holds a finished training made from something else ({stage.why_stale()}); {cure}")
    if (folder / "last.pt").is_file():
        changes = stage.changes(load_checkpoint(folder / "last.pt").get("made_from", {}))
        if changes:
            raise UserError(f"{folder} holds an unfinished training made from something else ({changes}); {cure}")


def network_checkpoint(run: Run, data: FoldData) -> dict:
    """Return what prediction needs: weights, normalisation, classes."""
    return {"model": run.model.state_dict(), "mean": list(data.normalisation.mean), "std": list(data.normalisation.std),
            "classes": list(CLASS_NAMES)}


def finished_checkpoint(work: Path, name: str, fold: int, folds: pd.DataFrame, which: str) -> tuple[Path, Recipe]:
    """Return the path of a fold's best.pt or last.pt, and the recipe that it was trained with.

    Raises UserError where the fold is not trained to its end, or was trained on other folds or images than
    there are now: its out-of-fold rows would not be out of fold.
    """
    folder = work / "runs" / name / f"fold{fold}"
    train = f"python 04_train.py --work {work} --recipe {name} --folds {fold}"
    if not sidecar(folder / "best.pt").is_file():
        raise UserError(f"{folder} has no finished training; run: {train}")
    meta = read_json(sidecar(folder / "best.pt"))
    recipe = from_dict({key: value for key, value in meta["parameters"].items() if key not in ("fold", "seed")})
    stage = Stage("04_train", folder / "best.pt", meta["parameters"], training_inputs(work, folds, recipe))
    reason = stage.why_stale()
    if reason:
        raise UserError(f"{folder} was trained on something else ({reason}); run: {train} --force")
    return folder / f"{which}.pt", recipe


def load_network(path: Path, recipe: Recipe, hardware: Hardware) -> tuple[torch.nn.Module, Normalisation]:
    """Return a trained network on the device, and the normalisation it was trained with."""
    saved = load_checkpoint(path)
    if saved["classes"] != list(CLASS_NAMES):
        raise UserError(f"{path} was trained for {len(saved['classes'])} other classes; expected {N_CLASSES}")
    model = build_model(recipe, N_CLASSES)
    model.load_state_dict(saved["model"])
    return (model.to(hardware.device, memory_format=torch.channels_last),
            Normalisation(tuple(saved["mean"]), tuple(saved["std"])))


# --- learning rate finder ----------------------------------------------------------------------------------

def lr_range_test(data: FoldData, recipe: Recipe, hardware: Hardware, fold: int, seed: int, n_steps: int = 100,
                  low: float = 1e-5, high: float = 10.0, label: str = "learning rates") -> tuple[list[float], list[float]]:
    """Train a fresh network while the learning rate grows per batch from `low` to `high`; stop when it diverges.

    The rate is that of the last layer group; the others keep their ratio to it. Returns rates and losses.
    """
    run = new_run(recipe, hardware, seed, fold)
    weights = class_weights(data, recipe, hardware)
    rates, losses = [], []
    run.model.train()
    for images, targets in progress(endless(data, recipe, hardware, seed, n_steps), n_steps, label, unit="batches"):
        rates.append(exponential_range(len(rates), n_steps, low, high))
        for group in run.optimizer.param_groups:
            group["lr"] = rates[-1] * group["top_lr"] / run.optimizer.param_groups[-1]["top_lr"]
        seed_torch(seed, 1, len(rates))
        losses.append(train_step(run, data.normalisation(images, hardware.device), targets.to(hardware.device),
                                 weights, 1.0, recipe, hardware).item())
        if has_diverged(losses):
            break
    return rates, losses


def endless(data: FoldData, recipe: Recipe, hardware: Hardware, seed: int, n_steps: int):
    """Yield `n_steps` training batches, epoch after epoch."""
    done = epoch = 0
    while done < n_steps:
        batches = EpochBatches(len(data.train), recipe.batch_size, seed, epoch)
        for batch in loader(data.train, hardware.workers, hardware.is_gpu, batches):
            yield batch
            done += 1
            if done == n_steps:
                return
        epoch += 1


def save_lr_curve(folder: Path, rates: list[float], losses: list[float]) -> float:
    """Write lr_find.csv and lr_find.png; returns the suggested learning rate."""
    from matplotlib.figure import Figure

    suggestion = suggest_learning_rate(rates, losses)
    write_csv(folder / "lr_find.csv", pd.DataFrame({"learning_rate": rates, "loss": losses, "smoothed": smoothed(losses)}))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="0.75", label="loss of the batch")
    axes.plot(rates, smoothed(losses), color="C0", label="smoothed")
    axes.axvline(suggestion, color="C1", linestyle="--", label=f"suggestion {suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate of the head (per batch, growing)", ylabel="E-loss",
             ylim=(0, 1.1 * max(losses[0], np.median(losses))))
    axes.legend()
    with writing(folder / "lr_find.png") as temporary:
        figure.savefig(temporary, dpi=120)
    return suggestion
