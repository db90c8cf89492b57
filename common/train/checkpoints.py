"""Checkpoints on disk: what stage 04 may resume or must not overwrite, and networks for prediction."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Self

import pandas as pd
import torch

from common.artifacts.arrays import refuse_damaged, refuse_inflated
from common.artifacts.files import writing
from common.artifacts.layout import Layout
from common.artifacts.stage import Stage, read_sidecar, sidecar
from common.artifacts.versions import made_with
from common.classes import CLASS_NAMES, N_CLASSES
from common.errors import UserError, first_line
from common.recipes import Recipe, asked_recipe, from_dict, recipe_of_run, to_dict
from common.train.dataset import Normalisation
from common.train.fold_data import training_inputs
from common.train.hardware import Hardware, set_kernels
from common.train.networks import Classifier, build_model
from common.train.run import FORMAT, NUMBER, Kind, Run, saved_pieces

TRAIN_AGAIN = "train the fold again with --force, or use the version that wrote it"

# In every checkpoint.
NETWORK: dict[str, Kind] = {"model": dict, "mean": list, "std": list, "classes": list, "recipe": dict}
TRAINING: dict[str, Kind] = {  # in last.pt too
    "made_from": dict,
    "good": (dict, type(None)),
    **{name: piece.kind for name, piece in saved_pieces(Run).items()},
}


def save_checkpoint(path: Path, values: dict) -> None:
    """Write a checkpoint of tensors and plain types in one go."""
    with writing(path) as temporary, open(temporary, "wb") as file:  # given a path, torch hides the disk's error
        torch.save({**values, "made_with": made_with()}, file)


def snapshot(value: Any) -> Any:
    """Return a copy on the CPU of nested dicts, lists and tensors, before training changes them."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(part) for key, part in value.items()}
    return [snapshot(part) for part in value] if isinstance(value, list) else value


class Writer:
    """A thread that writes while training continues, one job after the other; the next call raises its error."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.job: Future | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown()
        if kind is None:
            self.wait()

    def start(self, write: Callable[[], object]) -> None:
        """Call `write()` in the background, as soon as the previous write is done."""
        self.wait()
        self.job = self.thread.submit(write)

    def wait(self) -> None:
        """Return when everything is written."""
        if self.job:
            self.job.result()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of tensors and plain types onto the CPU; no code in it is ever run.

    Raises UserError for an unreadable file, and for a checkpoint of other classes or another version of this project.
    """
    try:
        refuse_inflated(path)
        refuse_damaged(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        raise UserError(
            f"{path} is not a readable checkpoint ({first_line(error)}); delete it and train the fold again"
        ) from None
    found = saved.get("format", 1) if isinstance(saved, dict) else "no"
    if found != FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {found}, this version of the project reads format {FORMAT}; "
            f"{TRAIN_AGAIN}"
        )
    check_types(path, saved)
    check_classes(path, saved["classes"])
    return saved


def check_types(path: Path, saved: dict) -> None:
    """Refuse a checkpoint with missing entries, or with other kinds of values than this project writes."""
    kinds = {**NETWORK, **{key: kind for key, kind in TRAINING.items() if key in saved}}
    fits = {key: isinstance(saved.get(key), kind) for key, kind in kinds.items()}
    for key in ("mean", "std"):
        fits[key] = fits[key] and len(saved[key]) == 4 and all(isinstance(value, NUMBER) for value in saved[key])
    wrong = [key for key, fine in fits.items() if not fine]
    if wrong:
        has_no = "has no" if wrong[0] not in saved else "has no valid"
        raise UserError(f"{path} is not a checkpoint that this project wrote: it {has_no} {wrong[0]!r}; {TRAIN_AGAIN}")


def check_classes(path: Path, found: list) -> None:
    """Refuse a checkpoint whose classes differ in number, name or order."""
    if len(found) != N_CLASSES:
        raise UserError(
            f"{path} was trained for {len(found)} classes, expected the {N_CLASSES} of this project; {TRAIN_AGAIN}"
        )
    for number, (name, expected) in enumerate(zip(found, CLASS_NAMES, strict=True)):
        if name != expected:
            raise UserError(
                f"{path} was trained for other classes: class {number} is {name!r}, expected {expected!r}; "
                f"{TRAIN_AGAIN}"
            )


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turn torch's errors for a checkpoint of another network, or with missing parts, into one message."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else shorten(str(error), 240)
        raise UserError(f"{path} does not fit the network of this version ({reason}); {TRAIN_AGAIN}") from None


def check_recipe(path: Path, saved: dict, recipe: Recipe) -> None:
    """Refuse a checkpoint of another recipe than expected, and name both; see `from_dict` for older versions."""
    try:
        found = to_dict(from_dict(saved["recipe"]))
    except UserError as error:
        raise UserError(f"{path}: {error}; {TRAIN_AGAIN}") from None
    changed = [f"{key} {found[key]}, expected {value}" for key, value in to_dict(recipe).items() if found[key] != value]
    if changed:
        raise UserError(
            f"{path} was trained with another recipe: {'; '.join(changed)}; train the fold again with --force"
        )


def relabel(path: Path, recipe: Recipe) -> None:
    """Write a recipe into a network's file, of a training that has got more cycles; leave it alone if it is there."""
    saved = load_checkpoint(path)
    if saved["recipe"] != to_dict(recipe):
        save_checkpoint(path, {**saved, "recipe": to_dict(recipe)})


def made_from(folder: Path) -> dict | None:
    """Return what a fold's finished or unfinished training was made from; None without a training."""
    if sidecar(folder / "best.pt").is_file():
        return read_sidecar(folder / "best.pt")
    if (folder / "last.pt").is_file():
        saved = load_checkpoint(folder / "last.pt")
        made = saved.get("made_from", {})
        if not all(isinstance(made.get(part), dict) for part in ("parameters", "inputs")):
            raise UserError(f"{folder / 'last.pt'} does not record what it was made from; {TRAIN_AGAIN}")
        return {**made, **{key: saved[key] for key in ("start", "start_file") if saved.get(key)}}
    return None


def prepare(stages: list[Stage], force: bool) -> None:
    """Refuse runs that another process trains, or that were made from something else; with `force` clear them all."""
    with ExitStack() as locks:
        for stage in stages:
            locks.enter_context(stage.lock())
            if not force:
                check_unfinished(stage)
        for stage in stages if force else ():
            clear(stage.artifact.parent)


def clear(folder: Path) -> None:
    """Delete a run's folder. Raises UserError if that fails: what is left would pass for the new training."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(
            f"--force cannot delete {folder} ({error.filename or folder}: "
            f"{error.strerror or error.args[0]}); get permission to delete it, ask its owner to, or give "
            "another --work"
        ) from None


def check_unfinished(stage: Stage) -> None:
    """Refuse to overwrite or continue a run that was made from something else; the caller holds the stage's lock."""
    folder = stage.artifact.parent
    cure = "use --force to discard it and train from scratch, or --name NAME to keep both, or give another --work"
    reason = stage.why_stale()
    if stage.sidecar.is_file() and reason:
        raise UserError(f"{folder} holds a finished training made from something else ({reason}); {cure}")
    changes = stage.changes(made_from(folder) or stage.made_from())
    if changes:
        raise UserError(f"{folder} holds an unfinished training made from something else ({changes}); {cure}")


def check_alike(work: Path, name: str, numbers: list[int]) -> None:
    """Refuse finished folds of one name with different recipes: their probabilities are combined."""
    first = None
    for fold in numbers:
        path = Layout(work).network(name, fold)
        if not sidecar(path).is_file():
            continue
        recipe = to_dict(asked_recipe(read_sidecar(path)["parameters"]))
        first = first or (fold, recipe)
        changed = [f"{key} {first[1][key]} and {value}" for key, value in recipe.items() if value != first[1][key]]
        if changed:
            again = Layout(work).command("04_train.py", "--recipe", name, "--folds", fold, "--force")
            raise UserError(
                f"folds {first[0]} and {fold} of {name} were trained with different recipes: {'; '.join(changed)}; "
                f"train one of them again: {again}"
            )


def finished_checkpoint(work: Path, name: str, fold: int, folds: pd.DataFrame, which: str) -> tuple[Path, Recipe]:
    """Return the path of a fold's best.pt or last.pt, and the recipe that it was trained with.

    Raises UserError if the fold's training is not finished, or used other folds or images than the current ones: its
    out-of-fold rows would not be out of fold.
    """
    folder = Layout(work).run(name, fold)
    train = Layout(work).command("04_train.py", "--recipe", name, "--folds", fold)
    if not sidecar(folder / "best.pt").is_file():
        raise UserError(f"{folder} has no finished training; run: {train}")
    meta = read_sidecar(folder / "best.pt")
    recipe = recipe_of_run(meta["parameters"])
    # The weights that it started from do not matter here.
    inputs = {**meta["inputs"], **training_inputs(work, folds, recipe)}
    reason = Stage("04_train", folder / "best.pt", meta["parameters"], inputs).why_stale()
    if reason:
        raise UserError(f"{folder} was trained on something else ({reason}); run: {train} --force")
    path = folder / f"{which}.pt"
    if not path.is_file():
        raise UserError(f"{path} no longer exists; predict with --checkpoint best, or run: {train} --force")
    return path, recipe


def load_network(path: Path, recipe: Recipe, hardware: Hardware) -> tuple[Classifier, Normalisation]:
    """Return a trained network on the device, and its normalisation; also choose this process's kernels."""
    set_kernels(hardware)
    saved = load_checkpoint(path)
    check_recipe(path, saved, recipe)
    model = build_model(recipe, N_CLASSES)
    with restoring(path):
        model.load_state_dict(saved.get("average", saved["model"]))  # best.pt has averaged weights as its model
    return (
        model.to(hardware.device, memory_format=torch.channels_last),  # type: ignore[call-overload]  # not in the stubs
        Normalisation(tuple(saved["mean"]), tuple(saved["std"])),
    )
