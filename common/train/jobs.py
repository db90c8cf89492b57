"""The jobs of stage 04, a recipe and fold each, and which of them are still to do."""

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd

from common.artifacts.layout import Layout
from common.artifacts.stage import Stage, fingerprint, read_sidecar
from common.errors import UserError
from common.recipes import Recipe, continued_of, current_fields, run_parameters
from common.train.checkpoints import finished_checkpoint, load_checkpoint, made_from
from common.train.distributed import Team
from common.train.fold_data import training_inputs
from common.train.hardware import Hardware, HardwareOptions, batch_bytes, choose_hardware, fit_shared_memory
from common.train.pretrained import Start, check_unseen, find_weights, start_from
from common.train.run import FORMAT


@dataclass(frozen=True)
class Request:
    """What stage 04 should train.

    recipes : by name, with sizes that the images allow
    force : train finished folds again, and restart unfinished ones from scratch
    pretrained, weights_dir : see `pretrained.find_weights`
    start_run : the run whose network of the same fold each training starts from, instead
    """

    work: Path
    recipes: dict[str, Recipe]
    folds: list[int]
    seed: int = 0
    force: bool = False
    pretrained: str = "auto"
    weights_dir: Path | None = None
    start_run: str | None = None


@dataclass(frozen=True)
class Job:
    """One fold of a recipe to train.

    stage : its outputs and inputs
    hardware : the command line's flags
    on_nan : when the loss stops being finite: "stop", or go "back" to the state at the start of the epoch
    track : names of trackers, see `trackers.TRACKERS`
    """

    work: Path
    name: str
    recipe: Recipe
    fold: int
    stage: Stage
    seed: int = 0
    start: Start = Start()
    hardware: HardwareOptions = HardwareOptions()
    on_nan: str = "stop"
    track: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name} fold {self.fold}"

    @property
    def folder(self) -> Path:
        return self.stage.artifact.parent


def plan(request: Request, folds: pd.DataFrame, team: Team) -> list[Job]:
    """Return a job for each recipe and fold that is not up to date."""
    jobs = []
    for job in every_job(request, folds, team):
        if not request.force and job.stage.is_current():
            job.stage.say_current()
        else:
            jobs.append(job)
            note_other_folds(job)
    return jobs


def every_job(request: Request, folds: pd.DataFrame, team: Team) -> list[Job]:
    """Return a job for each recipe and fold, up to date or not.

    With pretrained='auto' a training that has begun resumes with the weights that it started from, whatever is
    available now. A training that got more cycles keeps them.
    """
    if request.start_run in request.recipes:
        raise UserError(f"--start-from {request.start_run}: a run cannot start from itself; train another --recipe")

    @cache
    def weights(encoder: str) -> Path | None:
        return team.agree(find_weights(encoder, request.pretrained, request.weights_dir) if team.is_main else None)

    @cache
    def fresh_start(recipe: Recipe, fold: int) -> Start:
        if request.start_run:
            return start_from_run(request.work, request.start_run, fold, folds, recipe)
        return start_of_all(recipe)

    @cache
    def start_of_all(recipe: Recipe) -> Start:
        file = weights(recipe.encoder)
        if file and request.pretrained != "auto" and team.is_main:
            check_unseen(file, Layout(request.work).folds, request.folds)
        return start_from(recipe, request.pretrained, file)

    jobs = []
    for name, asked in request.recipes.items():
        inputs = training_inputs(request.work, folds, asked)
        for fold in request.folds:
            folder = Layout(request.work).run(name, fold)
            begun = None if request.force else made_from(folder)
            recipe, continued = as_continued(asked, begun)
            if begun and request.pretrained == "auto" and not request.start_run:
                note_changed_start(f"{name} fold {fold}", folder, begun)
                start, began_with = Start(), {key: value for key, value in begun["inputs"].items() if key == "weights"}
            else:
                start = fresh_start(asked, fold)
                began_with = start.inputs()
            parameters = run_parameters(recipe, fold, request.seed, FORMAT, continued)
            made_of = {**inputs, **began_with}
            stage = Stage("04_train", folder / "best.pt", parameters, made_of, whole=folder, complete=current_fields)
            jobs.append(Job(request.work, name, recipe, fold, stage, request.seed, start))
    return jobs


def start_from_run(work: Path, run: str, fold: int, folds: pd.DataFrame, recipe: Recipe) -> Start:
    """Return the start from another run's network of the same fold, which has not seen the fold's validation samples.

    Raises UserError unless that run's training is finished and was on the current folds.
    """
    path, _ = finished_checkpoint(work, run, fold, folds, "best")
    load_checkpoint(path)  # raises UserError for one of another format
    try:
        return start_from(recipe, str(path), path, f"{run} fold {fold}")
    except UserError as error:
        raise UserError(f"--start-from {run}: {error}") from None


def note_other_folds(job: Job) -> None:
    """Print a note if a fold begins with random weights, but a finished fold of the same run began with others."""
    finished = sorted(job.folder.parent.glob("fold*/best.pt.meta.json"))
    begun = job.folder / "last.pt"
    for record in (read_sidecar(path.with_name("best.pt")) for path in finished if path.parent != job.folder):
        if record.get("start_file") and not job.start.file and not begun.is_file():
            print(
                f"note: {job.label} starts {job.start.describe()}; fold {record['parameters'].get('fold')} of the same "
                f"run started {record['start']}. Give --start-from or --pretrained for the same start",
                flush=True,
            )
            return


def note_changed_start(label: str, folder: Path, begun: dict) -> None:
    """Print a note if a training started from a file whose content has changed since."""
    path = folder / (begun.get("start_file") or "")
    before = begun["inputs"].get("weights")
    if before and begun.get("start_file") and path.is_file() and fingerprint(path) != before:
        print(
            f"note: {label} started {begun.get('start', '')}; {os.path.normpath(path)} has changed since, so training "
            "again with --force would start from other weights",
            flush=True,
        )


def as_continued(asked: Recipe, begun: dict | None) -> tuple[Recipe, dict | None]:
    """Return a recipe with the cycles of its training, and how that came by them (see `run_parameters`).

    begun : what the training was made from
    """
    parameters = begun["parameters"] if begun else {}
    continued, cycles = continued_of(parameters), parameters.get("max_cycles")
    if continued and cycles and asked.max_cycles in (continued["asked"], cycles):
        return replace(asked, max_cycles=cycles), continued
    return asked, None


def training_hardware(job: Job) -> Hardware:
    """Return the hardware of a training, with as many loader processes as there is room for."""
    largest = batch_bytes(job.recipe, job.recipe.batch_size)
    return fit_shared_memory(choose_hardware(job.hardware), job.hardware, largest)
