"""The jobs of stages 04 and 05, a recipe and fold each: which ones there are to do, and each from start to seal."""

import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path

import pandas as pd

from common.artifacts.layout import Layout
from common.artifacts.predictions import save_predictions
from common.artifacts.stage import Record, Stage, sidecar
from common.data.folds import fold_numbers
from common.errors import UserError
from common.recipes import Recipe, current_fields, run_parameters
from common.train.checkpoints import (
    FORMAT,
    check_recipe,
    check_unfinished,
    finished_checkpoint,
    load_checkpoint,
    load_network,
    made_from,
    restoring,
)
from common.train.dataset import Normalisation
from common.train.distributed import Team
from common.train.fold_data import FoldData, image_set, load_fold, training_inputs
from common.train.hardware import Hardware, HardwareOptions, batch_bytes, choose_hardware, fit_shared_memory
from common.train.lr_finder import save_lr_curve
from common.train.predict import Fitting, mean_probabilities, predict_logits, views
from common.train.pretrained import Start, find_weights, start_from
from common.train.tensorboard import scalars
from common.train.training import Run, check_team, lr_range_test, new_run, train_fold


def plan(
    work: Path,
    recipes: dict[str, Recipe],
    folds: pd.DataFrame,
    numbers: list[int],
    seed: int,
    force: bool,
    pretrained: str,
    weights_dir: Path | None,
    team: Team,
) -> list[tuple]:
    """Return (stage, recipe, fold, start, label) for each recipe and fold that is not up to date.

    With pretrained='auto' a training that was begun goes on from what it began with, whatever can be had now.
    """

    @cache
    def weights(encoder: str) -> Path | None:
        return team.agree(find_weights(encoder, pretrained, weights_dir) if team.is_main else None)

    @cache
    def fresh_start(recipe: Recipe) -> Start:
        return start_from(recipe, pretrained, weights(recipe.encoder))

    jobs = []
    for name, recipe in recipes.items():
        inputs = training_inputs(work, folds, recipe)
        for fold in numbers:
            folder = Layout(work).run(name, fold)
            begun = None if force else made_from(folder)
            if begun and pretrained == "auto":
                start, began_with = Start(), {key: value for key, value in begun["inputs"].items() if key == "weights"}
            else:
                start = fresh_start(recipe)
                began_with = start.inputs()
            stage = Stage(
                "04_train",
                folder / "best.pt",
                run_parameters(recipe, fold, seed, FORMAT),
                {**inputs, **began_with},
                whole=folder,
                complete=current_fields,
            )
            if not force and stage.is_current():
                stage.say_current()
            else:
                jobs.append((stage, recipe, fold, start, f"{name} fold {fold}"))
    return jobs


def begin_fold(
    folder: Path, data: FoldData, recipe: Recipe, hardware: Hardware, fold: int, seed: int, start: Start, label: str
) -> Run:
    """Return a fold's run: as `folder`/last.pt left it, or at its start, with the learning rates that were found."""
    if (folder / "last.pt").is_file():
        saved = load_checkpoint(folder / "last.pt")
        check_recipe(folder / "last.pt", saved, recipe)
        run = new_run(recipe, data, hardware, fold, seed)
        with restoring(folder / "last.pt"):
            run.restore(saved)
        run.good = saved.get("good")
        run.normalise = Normalisation(tuple(saved["mean"]), tuple(saved["std"]))
        print(
            f"{label}: going on at epoch {run.epoch + 1}" + (f", batch {run.step + 1}" if run.step else ""), flush=True
        )
        return run
    print(f"{label}: {start.describe()}", flush=True)
    weights, rates = start.read(), recipe.group_learning_rates
    if recipe.finder != "off":
        rates = found_rates(folder, data, recipe, hardware, fold, seed, weights, label)
    run = new_run(recipe, data, hardware, fold, seed, weights, rates)
    run.start = start.describe()
    return run


def training_hardware(options: HardwareOptions, recipe: Recipe) -> Hardware:
    """Return the hardware of a training, with as many loader processes as have room for its batches."""
    return fit_shared_memory(choose_hardware(options), options, batch_bytes(recipe, recipe.batch_size))


def train_job(
    stage: Stage,
    recipe: Recipe,
    fold: int,
    start: Start,
    label: str,
    work: Path,
    seed: int,
    options: HardwareOptions,
    on_nan: str = "stop",
    tensorboard: bool = False,
) -> None:
    """Train one fold from what is on disk and seal it: one job of stage 04, in this process or a worker's.

    A fold that another process came to train meanwhile is waited for, except by several processes, who would lose touch.
    """
    folder, hardware = stage.artifact.parent, training_hardware(options, recipe)
    team = hardware.team
    with stage.lock(wait=team.size == 1) if team.is_main else nullcontext():
        if team.agree(team.is_main and stage.is_current()):  # another process has trained it meanwhile
            return stage.say_current()
        if team.is_main:
            check_unfinished(stage)
        folds = Layout(work).read_folds()
        data = load_fold(work, folds, fold, recipe, start.normalisation)
        stage.check_unchanged(training_inputs(work, folds, recipe))  # it may have waited for days
        check_team(recipe, len(data.train), hardware)
        run = begin_fold(folder, data, recipe, hardware, fold, seed, start, label)
        with scalars(folder, run.history) if tensorboard and team.is_main else nullcontext() as note:
            train_fold(run, folder, data, stage.made_from(), label, on_nan, note)
        if not team.is_main:
            return
        # The rest is not sealed: whoever needs the space of last.pt may delete it.
        stage.seal(Record(len(data.train), [folder / "log.jsonl"], sealed_with(run, hardware)))


def sealed_with(run: Run, hardware: Hardware) -> dict:
    """Return what a finished training's sidecar notes of it."""
    return {
        "epochs": run.epoch,
        "score_best": run.best_score,
        "start": run.start,
        "hardware": hardware.record(),
        "returns": run.returns,
        "mean": list(run.normalise.mean),
        "std": list(run.normalise.std),
        "learning_rates": [group["top_lr"] for group in run.optimizer.param_groups],
    }


def found_rates(
    folder: Path,
    data: FoldData,
    recipe: Recipe,
    hardware: Hardware,
    fold: int,
    seed: int,
    weights: dict | None,
    label: str,
) -> tuple[float, ...]:
    """Save the finder's curve and return the learning rates to train with: by its suggestion, or the recipe's."""
    rates, losses = lr_range_test(data, recipe, hardware, fold, seed, weights, label=f"{label} learning rates")
    groups = recipe.group_learning_rates
    if not math.isfinite(losses[0]):  # training meets the same batch first, and deals with it
        print(
            f"{label}: the loss is not finite from the very first batch, so there is no learning rate to be found",
            flush=True,
        )
        return groups
    curve = save_lr_curve(folder, rates, losses) if hardware.team.is_main else (math.nan, math.nan)
    suggestion, steepest = hardware.team.agree(curve)
    if recipe.finder == "use":
        groups = tuple(suggestion * rate / groups[-1] for rate in groups)
    used, of = ", ".join(f"{rate:.2g}" for rate in groups), "by that" if recipe.finder == "use" else "of the recipe"
    print(
        f"{label}: highest learning rate at which the loss still falls: {suggestion:.2g}, at which it falls fastest: "
        f"{steepest:.2g}; learning rates {used} ({of}); curve: {folder / 'lr_find.png'}",
        flush=True,
    )
    return groups


def find_lr(
    stage: Stage, recipe: Recipe, fold: int, start: Start, label: str, work: Path, seed: int, options: HardwareOptions
) -> None:
    """Run the learning rate finder of a fold and save its curve: a job of stage 04 with --find-lr."""
    data = load_fold(work, Layout(work).read_folds(), fold, recipe, start.normalisation)
    hardware = training_hardware(options, recipe)
    with stage.lock() if hardware.team.is_main else nullcontext():
        found_rates(stage.artifact.parent, data, recipe, hardware, fold, seed, start.read(), label)


def prediction_stage(
    work: Path,
    recipe_name: str,
    fold: int,
    part: str,
    rows: pd.DataFrame,
    settings: dict,
    network: Path,
    recipe: Recipe,
) -> Stage:
    """Return what stage 05 makes for one part of the samples with the network of one fold."""
    return Stage(
        "05_predict_oof",
        Layout(work).predictions(recipe_name, part, fold),
        settings,
        {"network": network, "images": Layout(work).images_digest(recipe.store, rows["Id"])},
    )


def predicted_folds(
    work: Path,
    recipe_name: str,
    numbers: list[int],
    folds: pd.DataFrame,
    parts_of: Callable[[int], dict[str, pd.DataFrame]],
    settings: dict,
) -> dict[str, list[int]]:
    """Return for each part of the samples the folds whose predictions belong together: `numbers`, and the others that are
    predicted and up to date. Says which predictions of other folds are left out, and why.

    parts_of : function of the fold -> part -> table of its samples
    """
    found = {part: list(numbers) for part in parts_of(numbers[0])}
    recipe = finished_checkpoint(work, recipe_name, numbers[0], folds, settings["checkpoint"])[1]
    for fold in (fold for fold in fold_numbers(folds) if fold not in numbers):
        files = {part: Layout(work).predictions(recipe_name, part, fold) for part in found}
        made = {part: rows for part, rows in parts_of(fold).items() if sidecar(files[part]).is_file()}
        for part, reason in why_not_current(work, recipe_name, fold, folds, made, settings, recipe).items():
            if reason:
                print(f"05_predict_oof: {files[part]} is left out of {part}.npz: {reason}")
            else:
                found[part].append(fold)
    return {part: sorted(some) for part, some in found.items()}


def why_not_current(
    work: Path,
    recipe_name: str,
    fold: int,
    folds: pd.DataFrame,
    parts: dict[str, pd.DataFrame],
    settings: dict,
    recipe: Recipe,
) -> dict[str, str | None]:
    """Return for each part why a fold's predictions are not those that stage 05 would make now with a network of this recipe;
    None where they are."""
    if not parts:
        return {}
    try:
        path, own = finished_checkpoint(work, recipe_name, fold, folds, settings["checkpoint"])
    except UserError as error:
        return dict.fromkeys(parts, str(error))
    if own != recipe:
        return dict.fromkeys(parts, f"fold {fold} was trained with another recipe")
    return {
        part: prediction_stage(work, recipe_name, fold, part, rows, settings, path, own).why_stale()
        for part, rows in parts.items()
    }


def predict_job(
    work: Path,
    recipe_name: str,
    fold: int,
    folds: pd.DataFrame,
    parts: dict[str, pd.DataFrame],
    settings: dict,
    batch_size: int,
    options: HardwareOptions,
) -> None:
    """Write a fold's probabilities for each part of the samples, where they are not up to date: one job of stage 05."""
    path, recipe = finished_checkpoint(work, recipe_name, fold, folds, settings["checkpoint"])
    network, fitting = None, Fitting()
    for part, rows in parts.items():
        stage = prediction_stage(work, recipe_name, fold, part, rows, settings, path, recipe)
        if stage.is_current():
            stage.say_current()
            continue
        with stage.lock(wait=True), ExitStack() as making:
            if stage.is_current():  # another process made it meanwhile
                continue
            record = making.enter_context(stage.making())
            hardware = choose_hardware(options, training=False)
            hardware = fit_shared_memory(hardware, options, batch_bytes(recipe, 0, batch_size))
            network = network or load_network(path, recipe, hardware)
            logits = predict_logits(
                *network,
                image_set(work, recipe, rows),
                hardware,
                views(settings["tta"], recipe.crop if settings["view"] == "crops" else None),
                batch_size,
                f"{recipe_name} fold {fold} {part}",
                fitting=fitting,
            )
            save_predictions(stage.artifact, rows["Id"], mean_probabilities(logits))
            record.rows, record.notes = len(rows), {"hardware": hardware.record()}
        print(
            f"05_predict_oof: {recipe_name} fold {fold}: {len(rows)} {part} samples x {len(logits)} views", flush=True
        )
