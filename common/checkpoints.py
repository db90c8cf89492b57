"""Checkpoints on disk: what stage 04 may go on from or must not overwrite, and networks for prediction."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch

from common.arrays import refuse_inflated
from common.artifacts import Stage, read_sidecar, sidecar
from common.classes import CLASS_NAMES, N_CLASSES
from common.errors import UserError, first_line
from common.files import writing
from common.fold_data import training_inputs
from common.inference import Hardware, Normalisation
from common.models import build_model
from common.recipes import Recipe, from_dict, to_dict


FORMAT = 2  # of checkpoints; one more whenever older ones could be misread


def save_checkpoint(path: Path, values: dict) -> None:
    """Write a checkpoint of tensors and plain types in one go."""
    with writing(path) as temporary, open(temporary, "wb") as file:  # given a path, torch hides what the disk says
        torch.save(values, file)


def snapshot(value):
    """Return a copy on the CPU of nested dicts, lists and tensors, which training goes on to change."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(part) for key, part in value.items()}
    return [snapshot(part) for part in value] if isinstance(value, list) else value


class Writer:
    """A thread that writes while training goes on, one thing after the other; the next call raises what failed."""

    def __init__(self):
        self.thread, self.job = ThreadPoolExecutor(1), None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.thread.shutdown()
        if kind is None:
            self.wait()

    def start(self, write) -> None:
        """Call `write()` beside what the caller does next, as soon as the write before it is done."""
        self.wait()
        self.job = self.thread.submit(write)

    def wait(self) -> None:
        """Return when everything is written."""
        if self.job:
            self.job.result()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of tensors and plain types onto the CPU; no code in it is ever run.

    Raises UserError for what cannot be read, and for a checkpoint of another version of this project or other classes.
    """
    try:
        refuse_inflated(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{path} is not a checkpoint that can be read ({first_line(error)}); "
                        "delete it and train the fold again") from None
    found = saved.get("format", 1) if isinstance(saved, dict) else "no"
    if found != FORMAT:
        raise UserError(f"{path} is a checkpoint of format {found}, this version of the project reads format {FORMAT}; train the "
                        "fold again with --force, or use the version that wrote it")
    if saved["classes"] != list(CLASS_NAMES):
        raise UserError(f"{path} was trained for {len(saved['classes'])} classes, expected the {N_CLASSES} of this project; "
                        "train the fold again with --force")
    return saved


def check_recipe(path: Path, saved: dict, recipe: Recipe) -> None:
    """Refuse a checkpoint of another recipe than is expected, with both named."""
    expected = to_dict(recipe)
    changed = [f"{key} {saved['recipe'].get(key)}, expected {expected.get(key)}" for key in {**saved["recipe"], **expected}
               if saved["recipe"].get(key) != expected.get(key)]
    if changed:
        raise UserError(f"{path} was trained with another recipe: {'; '.join(changed)}; train the fold again with --force")


def made_from(folder: Path) -> dict | None:
    """Return what a fold's finished or unfinished training was made from; None where there is none."""
    if sidecar(folder / "best.pt").is_file():
        return read_sidecar(folder / "best.pt")
    if (folder / "last.pt").is_file():
        return load_checkpoint(folder / "last.pt")["made_from"]
    return None


def prepare(stages: list[Stage], force: bool) -> None:
    """Refuse runs that another process trains, or that were made from something else; clear all of them with `force`."""
    with ExitStack() as locks:
        for stage in stages:
            locks.enter_context(stage.lock())
            if not force:
                check_unfinished(stage)
        for stage in stages if force else ():
            shutil.rmtree(stage.artifact.parent, ignore_errors=True)


def check_unfinished(stage: Stage) -> None:
    """Refuse to overwrite or continue a run that was made from something else; the caller holds the stage's lock."""
    folder = stage.artifact.parent
    cure = "use --force to throw it away and train anew, or another --work"
    reason = stage.why_stale()
    if stage.sidecar.is_file() and reason:
        raise UserError(f"{folder} holds a finished training made from something else ({reason}); {cure}")
    changes = stage.changes(made_from(folder) or stage.made_from())
    if changes:
        raise UserError(f"{folder} holds an unfinished training made from something else ({changes}); {cure}")


def finished_checkpoint(work: Path, name: str, fold: int, folds: pd.DataFrame, which: str) -> tuple[Path, Recipe]:
    """Return the path of a fold's best.pt or last.pt, and the recipe that it was trained with.

    Raises UserError where the fold is not trained to its end, or was trained on other folds or images than
    there are now: its out-of-fold rows would not be out of fold.
    """
    folder = work / "runs" / name / f"fold{fold}"
    train = f"python 04_train.py --work {work} --recipe {name} --folds {fold}"
    if not sidecar(folder / "best.pt").is_file():
        raise UserError(f"{folder} has no finished training; run: {train}")
    meta = read_sidecar(folder / "best.pt")
    recipe = from_dict({key: value for key, value in meta["parameters"].items() if key not in ("fold", "seed")})
    # Which weights it began with is of no concern here.
    inputs = {**meta["inputs"], **training_inputs(work, folds, recipe)}
    reason = Stage("04_train", folder / "best.pt", meta["parameters"], inputs).why_stale()
    if reason:
        raise UserError(f"{folder} was trained on something else ({reason}); run: {train} --force")
    return folder / f"{which}.pt", recipe


def load_network(path: Path, recipe: Recipe, hardware: Hardware) -> tuple[torch.nn.Module, Normalisation]:
    """Return a trained network on the device, and the normalisation it was trained with."""
    saved = load_checkpoint(path)
    check_recipe(path, saved, recipe)
    model = build_model(recipe, N_CLASSES)
    model.load_state_dict(saved["model"])
    return (model.to(hardware.device, memory_format=torch.channels_last),
            Normalisation(tuple(saved["mean"]), tuple(saved["std"])))
