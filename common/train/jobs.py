"""The jobs of stage 04, a recipe and fold each: which ones there are to do."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from common.artifacts.layout import Layout
from common.artifacts.stage import Stage
from common.recipes import Recipe, current_fields, run_parameters
from common.train.checkpoints import made_from
from common.train.distributed import Team
from common.train.fold_data import training_inputs
from common.train.hardware import Hardware, HardwareOptions, batch_bytes, choose_hardware, fit_shared_memory
from common.train.pretrained import Start, find_weights, start_from
from common.train.run import FORMAT


@dataclass(frozen=True)
class Request:
    """What stage 04 is asked to train.

    recipes : by name, as the images can give them
    force : train what is trained already too, and begin what was begun from scratch
    pretrained, weights_dir : see `pretrained.find_weights`
    """

    work: Path
    recipes: dict[str, Recipe]
    folds: list[int]
    seed: int = 0
    force: bool = False
    pretrained: str = "auto"
    weights_dir: Path | None = None


@dataclass(frozen=True)
class Job:
    """One fold of a recipe to train.

    stage : what it makes, from what
    hardware : what the command line asks for
    on_nan : when the loss stops being finite: "stop", or "back" to the state that the epoch began with
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
    tensorboard: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} fold {self.fold}"

    @property
    def folder(self) -> Path:
        return self.stage.artifact.parent


def plan(request: Request, folds: pd.DataFrame, team: Team) -> list[Job]:
    """Return a job for each recipe and fold that is not up to date.

    With pretrained='auto' a training that was begun continues from what it began with, whatever can be had now.
    """

    @cache
    def weights(encoder: str) -> Path | None:
        return team.agree(find_weights(encoder, request.pretrained, request.weights_dir) if team.is_main else None)

    @cache
    def fresh_start(recipe: Recipe) -> Start:
        return start_from(recipe, request.pretrained, weights(recipe.encoder))

    jobs = []
    for name, recipe in request.recipes.items():
        inputs = training_inputs(request.work, folds, recipe)
        for fold in request.folds:
            folder = Layout(request.work).run(name, fold)
            begun = None if request.force else made_from(folder)
            if begun and request.pretrained == "auto":
                start, began_with = Start(), {key: value for key, value in begun["inputs"].items() if key == "weights"}
            else:
                start = fresh_start(recipe)
                began_with = start.inputs()
            parameters = run_parameters(recipe, fold, request.seed, FORMAT)
            made_of = {**inputs, **began_with}
            stage = Stage("04_train", folder / "best.pt", parameters, made_of, whole=folder, complete=current_fields)
            if not request.force and stage.is_current():
                stage.say_current()
            else:
                jobs.append(Job(request.work, name, recipe, fold, stage, request.seed, start))
    return jobs


def training_hardware(job: Job) -> Hardware:
    """Return the hardware of a training, with as many loader processes as have room for its batches."""
    largest = batch_bytes(job.recipe, job.recipe.batch_size)
    return fit_shared_memory(choose_hardware(job.hardware), job.hardware, largest)
