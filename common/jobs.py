"""The jobs of stage 04: which folds are to be trained, from what, and each of them from start to seal."""

from functools import cache
from pathlib import Path

import pandas as pd

from common.artifacts import Stage, read_table
from common.checkpoints import load_checkpoint, made_from
from common.distributed import Team
from common.finder import save_lr_curve
from common.fold_data import FoldData, load_fold, training_inputs
from common.inference import Hardware, Normalisation, choose_hardware
from common.recipes import Recipe, to_dict
from common.start import Start, start_from
from common.training import Run, lr_range_test, new_run, train_fold
from common.weights import find_weights


def plan(work: Path, recipes: dict[str, Recipe], folds: pd.DataFrame, numbers: list[int], seed: int, force: bool,
         pretrained: str, weights_dir: Path | None, team: Team) -> list[tuple]:
    """Return (stage, recipe, fold, start, label) for each recipe and fold that is not up to date.

    With pretrained='auto' a training that was begun goes on from what it began with, whatever can be had now.
    """
    @cache
    def weights(encoder):
        return team.agree(find_weights(encoder, pretrained, weights_dir) if team.is_main else None)

    jobs = []
    for name, recipe in recipes.items():
        inputs = training_inputs(work, folds, recipe)
        for fold in numbers:
            folder = work / "runs" / name / f"fold{fold}"
            begun = None if force else made_from(folder)
            if begun and pretrained == "auto":
                start, began_with = Start(), {key: value for key, value in begun["inputs"].items() if key == "weights"}
            else:
                start = start_from(recipe, pretrained, weights(recipe.encoder))
                began_with = start.inputs()
            stage = Stage("04_train", folder / "best.pt", {**to_dict(recipe), "fold": fold, "seed": seed},
                          {**inputs, **began_with})
            if force or not stage.is_current(rebuilds=False):
                jobs.append((stage, recipe, fold, start, f"{name} fold {fold}"))
    return jobs


def begin_fold(folder: Path, data: FoldData, recipe: Recipe, hardware: Hardware, fold: int, seed: int, start: Start,
               label: str) -> Run:
    """Return a fold's run: as `folder`/last.pt left it, or at its start, with the learning rates that were found."""
    if (folder / "last.pt").is_file():
        saved = load_checkpoint(folder / "last.pt")
        run = new_run(recipe, data, hardware, fold, seed)
        run.restore(saved)
        run.normalise = Normalisation(tuple(saved["mean"]), tuple(saved["std"]))
        print(f"{label}: going on at epoch {run.epoch + 1}" + (f", batch {run.step + 1}" if run.step else ""), flush=True)
        return run
    print(f"{label}: {start.describe()}", flush=True)
    weights, rates = start.read(), recipe.group_learning_rates
    if recipe.finder != "off":
        rates = found_rates(folder, data, recipe, hardware, fold, seed, weights, label)
    run = new_run(recipe, data, hardware, fold, seed, weights, rates)
    run.start = start.describe()
    return run


def train_job(stage: Stage, recipe: Recipe, fold: int, start: Start, label: str, work: Path, seed: int,
              hardware_flags: tuple) -> None:
    """Train one fold from what is on disk and seal it: one job of stage 04, in this process or a worker's."""
    folder = stage.artifact.parent
    data = load_fold(work, read_table(work / "folds.csv", "python 03_make_folds.py"), fold, recipe, seed,
                     start.normalisation)
    run = begin_fold(folder, data, recipe, choose_hardware(*hardware_flags), fold, seed, start, label)
    train_fold(run, folder, data, stage.made_from(), label)
    if not run.hardware.team.is_main:
        return
    # The rest is not sealed: whoever needs the space of last.pt may delete it.
    stage.finish(rows=len(data.train), also=[folder / "log.jsonl"], epochs=run.epoch, score_best=run.best_score, start=run.start,
                 mean=list(run.normalise.mean), std=list(run.normalise.std),
                 learning_rates=[group["top_lr"] for group in run.optimizer.param_groups])


def found_rates(folder: Path, data: FoldData, recipe: Recipe, hardware: Hardware, fold: int, seed: int,
                weights: dict | None, label: str) -> tuple[float, ...]:
    """Save the finder's curve and return the learning rates to train with: by its suggestion, or the recipe's."""
    rates, losses = lr_range_test(data, recipe, hardware, fold, seed, weights, label=f"{label} learning rates")
    suggestion = hardware.team.agree(save_lr_curve(folder, rates, losses) if hardware.team.is_main else None)
    groups = recipe.group_learning_rates
    if recipe.finder == "use":
        groups = tuple(suggestion * rate / groups[-1] for rate in groups)
    print(f"{label}: highest learning rate at which the loss still falls: {suggestion:.2g}; learning rates "
          f"{', '.join(f'{rate:.2g}' for rate in groups)} ({'by that' if recipe.finder == 'use' else 'of the recipe'}); "
          f"curve: {folder / 'lr_find.png'}", flush=True)
    return groups


def find_lr(stage: Stage, recipe: Recipe, fold: int, start: Start, label: str, work: Path, seed: int,
            hardware_flags: tuple) -> None:
    """Run the learning rate finder of a fold and save its curve: a job of stage 04 with --find-lr."""
    data = load_fold(work, read_table(work / "folds.csv", "python 03_make_folds.py"), fold, recipe, seed,
                     start.normalisation)
    found_rates(stage.artifact.parent, data, recipe, choose_hardware(*hardware_flags), fold, seed, start.read(), label)
