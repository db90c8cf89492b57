"""The artifacts of a work folder, read on demand; a missing one is a UserError that names its stage."""

import shlex
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from common.artifacts.files import csv_files, read_lines
from common.artifacts.layout import Layout
from common.artifacts.predictions import load_predictions
from common.artifacts.stage import fingerprint, read_sidecar, sidecar
from common.artifacts.tables import read_table
from common.classes import CLASS_NAMES
from common.data.labels import parse_targets, read_labels
from common.data.pictures import composite, jpeg, small_planes
from common.errors import UserError
from common.recipes import Recipe, continued_of, recipe_of_run
from common.report.page import Card, data_uri
from common.score.ensemble import combine, stack_members
from common.score.members import read_members
from common.score.submission import read_thresholds, remembered_submissions

NAMES = np.array(CLASS_NAMES)
THUMBNAIL = 256  # pixels per side at most
SHOWN = 12  # cards of a gallery
T = TypeVar("T")


def class_names(target: str) -> str:
    """Return a label text, for example '22 2', as class names; 'unknown' without labels, as for test samples."""
    return ", ".join(CLASS_NAMES[int(label)] for label in sorted(target.split(), key=int)) or "unknown"


def there(read: Callable[[], T]) -> T | None:
    """Return the result of `read()`; None if its stage has not run."""
    try:
        return read()
    except UserError:
        return None


def speed_and_memory(logs: Iterable[pd.DataFrame]) -> dict[str, float]:
    """Return the median of images per second, and the most memory, over all epochs of some trainings' logs."""
    columns = ["images_per_second", "memory_mib"]
    rows = pd.concat([log.reindex(columns=columns).astype(float) for log in logs])
    return {"images/s": rows["images_per_second"].median(), "memory, MiB": rows["memory_mib"].max()}


def recorded_fingerprint(path: Path) -> str | None:
    """Return a file's fingerprint, a large network's from its sidecar; None if the file cannot be read."""
    try:
        if path.suffix == ".pt" and path.is_file() and sidecar(path).is_file():
            return read_sidecar(path)["outputs"].get(path.name)
        return fingerprint(path) if path.is_file() else None
    except OSError:
        return None


class Work:
    """The artifacts of a work folder as tables; each is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout = Layout(folder)
        self.fingerprint = cache(recorded_fingerprint)

    @cached_property
    def samples(self) -> pd.DataFrame:
        return self.layout.read_samples()

    @cached_property
    def duplicates(self) -> pd.DataFrame:
        return self.layout.read_duplicates()

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Near-identical pairs with the largest of their three distances, closest first."""
        pairs = self.layout.read_pairs()
        return pairs.assign(bits=pairs[["red", "green", "blue"]].max(axis=1)).sort_values(
            "bits", kind="stable", ignore_index=True
        )

    @cached_property
    def left_out(self) -> pd.DataFrame:
        """Id, part and reason of the samples that stage 01 left out."""
        path = self.layout.left_out
        table = read_table(path, self.layout.command("01_preprocess.py")) if path.is_file() else pd.DataFrame()
        return table.reindex(columns=["Id", "part", "reason"]).fillna("").astype(str)

    @cached_property
    def folds(self) -> pd.DataFrame:
        return self.layout.read_folds()

    @cached_property
    def targets_by_id(self) -> dict[str, str]:
        return dict(zip(self.samples["Id"], self.samples["Target"], strict=True))

    # --- images

    @cached_property
    def stores(self) -> dict[str, pd.DataFrame]:
        """Statistics of stored images by the folder's name, smallest images first."""
        tables = {
            path.stem: read_table(path, self.layout.preprocess_command(path.stem))
            for path in csv_files(self.layout.images)
        }
        return dict(sorted(tables.items(), key=lambda item: (item[1]["side"].max(), item[0])))

    def planes(self, Id: str, side: int) -> np.ndarray:
        """Return a sample's planes, (4, side, side) uint8, from the smallest stored images that are large enough.

        If none is, from the largest, at their own size. Raises UserError if they cannot be read.
        """
        fit = [name for name, table in self.stores.items() if table["side"].min() >= side]
        store = fit[0] if fit else next(reversed(self.stores), "")
        try:
            return small_planes(self.layout.store(store) / f"{Id}.tif", side)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the image of {Id} cannot be read ({error}); run: {self.layout.command('01_preprocess.py')}"
            ) from None

    def image(self, Id: str) -> tuple[str, str]:
        """Return a sample as (data URI, alt text); without a URI if its image cannot be read."""
        planes = there(lambda: self.planes(Id, THUMBNAIL))
        return (
            "" if planes is None else data_uri(jpeg(composite(planes))),
            f"sample {Id}: {class_names(self.targets_by_id.get(Id, ''))}",
        )

    def card(self, Ids: list[str], lines: list[str]) -> Card:
        return Card([self.image(Id) for Id in Ids], lines, " | ".join(Ids))

    # --- trainings

    @cached_property
    def runs(self) -> dict[str, dict[int, pd.DataFrame]]:
        """Return recipe -> fold -> log, a row per epoch, of the trainings that have begun."""
        logs: dict[str, dict[int, pd.DataFrame]] = {}
        for path in self.layout.runs.glob("*/fold*/log.jsonl"):
            recipe, fold = path.parent.parent.name, path.parent.name.removeprefix("fold")
            rows = read_lines(path) if fold.isdecimal() else []
            if rows:
                logs.setdefault(recipe, {})[int(fold)] = pd.DataFrame(rows)
        if not logs:
            raise UserError(f"no training has begun; run: {self.layout.command('04_train.py')}")
        return {name: dict(sorted(folds.items())) for name, folds in sorted(logs.items())}

    def run_folder(self, recipe: str, fold: int) -> Path:
        return self.layout.run(recipe, fold)

    def run_record(self, recipe: str, fold: int) -> dict:
        """Return the sidecar of a finished training; {} before that."""
        path = self.run_folder(recipe, fold) / "best.pt"
        return read_sidecar(path) if sidecar(path).is_file() else {}

    def run_recipe(self, recipe: str, fold: int) -> Recipe | None:
        """Return the recipe of a finished training."""
        parameters = self.run_record(recipe, fold).get("parameters")
        return recipe_of_run(parameters) if parameters else None

    def run_epochs(self, recipe: str, fold: int) -> str:
        """Return the number of a training's epochs; as a sum, those before and after it got more cycles."""
        done = len(self.runs[recipe][fold])
        continued = continued_of(self.run_record(recipe, fold).get("parameters", {}))
        parts = [0, *(continued["after"] if continued else []), done]
        return "+".join(str(end - begin) for begin, end in pairwise(parts))

    def run_tables(self, recipe: str, name: str) -> dict[int, pd.DataFrame]:
        """Return fold -> a CSV file of a recipe's trainings, of the folds that have it."""
        paths = {fold: self.run_folder(recipe, fold) / name for fold in self.runs.get(recipe, {})}
        return {
            fold: read_table(
                path, self.layout.command("04_train.py", "--recipe", recipe, "--folds", str(fold), "--force")
            )
            for fold, path in paths.items()
            if path.is_file()
        }

    # --- predictions and what follows

    @cached_property
    def thresholds(self) -> dict:
        return read_thresholds(self.layout.thresholds, None, shlex.join(["--work", str(self.folder)]))

    @cached_property
    def scores(self) -> dict:
        """The same as `thresholds`, if stage 06 has scored them."""
        if "score_cross_fitted" not in self.thresholds:
            raise UserError(
                f"the thresholds have no scores, since --reproduce took them from a submission; for scores run: "
                f"{self.layout.command('06_thresholds.py')}"
            )
        return self.thresholds

    @cached_property
    def given(self) -> dict[str, Path]:
        """The files that stage 06 read with --oof: name -> path of the members, labels and ids; else {}."""
        path = self.layout.thresholds
        record = read_sidecar(path) if path.is_file() and sidecar(path).is_file() else {"inputs": {"folds.csv": ""}}
        return (
            {}
            if "folds.csv" in record["inputs"]
            else {name: self.input_path(path, record, name) for name in record["inputs"]}
        )

    @cached_property
    def members(self) -> list[str]:
        """The names of the members: of the files given to stage 06, else recipes."""
        return self.thresholds["recipes"] if self.given else self.recipes

    @cached_property
    def recipes(self) -> list[str]:
        """The recipes of the ensemble that stage 06 scored, or the first one with predictions."""
        if self.layout.thresholds.is_file() and not self.given:
            return self.thresholds["recipes"]
        found = self.layout.predicted_runs()
        if not found:
            raise UserError(f"there are no out-of-fold predictions; run: {self.layout.command('05_predict_oof.py')}")
        return found[:1]

    @property
    def combined(self) -> str:
        """How the members are combined, in words."""
        return {"mean": "mean of", "weighted": "weighted mean of", "rank": "mean rank of"}[self.how[0]]

    @cached_property
    def how(self) -> tuple[str, list[float] | None]:
        """How stage 06 combines the members, and their weights; the plain mean before it has run."""
        found = self.thresholds if self.layout.thresholds.is_file() else {}
        return found.get("combine", "mean"), found.get("weights")

    def predictions(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return Ids (n,) and the probabilities (n_members, n, 28) of stage 05 for oof, test or held_out."""
        paths = [self.layout.predictions(recipe, part) for recipe in self.recipes]
        hint = self.layout.command("05_predict_oof.py", "--recipes", ",".join(self.recipes))
        found = [load_predictions(path, hint) for path in paths]
        return found[0][0], stack_members(found, [str(path) for path in paths])

    def given_predictions(self) -> tuple[pd.DataFrame, np.ndarray]:
        """Return the samples (Id, Target) that stage 06 scored given files on, and their (n_members, n, 28)."""
        if "labels" not in self.given:
            raise UserError("these predictions have no labels, since --reproduce took the thresholds from a submission")
        again = f"run: {self.layout.command('06_thresholds.py', '--oof', 'FILES', '--labels', 'CSV')}"
        if not set(self.members) <= set(self.given):
            raise UserError(f"{self.folder / 'thresholds.json'} is for other files than its sidecar; {again}")
        found = read_members([self.given[name] for name in self.members], self.given.get("ids"), None)
        labelled = read_labels(self.given["labels"]).set_index("Id")
        common = set(labelled.index).intersection(*(ids for ids, _ in found))
        if not common:
            raise UserError(f"the files given to stage 06 no longer have Ids in common; {again}")
        found = [(ids[kept], probs[kept]) for ids, probs in found for kept in [[Id in common for Id in ids]]]
        rows = labelled[labelled.index.isin(common)].reset_index()
        return rows, stack_members(found, self.members, rows["Id"].to_numpy())

    @cached_property
    def oof(self) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
        """Return the predicted rows, their targets (n, 28) bool, and probabilities (n, 28) as stage 06 combines them.

        Rows have Id and Target; they are those of folds.csv if stage 05 predicted them.
        """
        if self.given:
            rows, stack = self.given_predictions()
        else:
            ids, stack = self.predictions("oof")
            rows = self.folds.set_index("Id")
            if not set(ids) <= set(rows.index):
                raise UserError(
                    "the predictions are for other samples than those of folds.csv; run: "
                    f"{self.layout.command('05_predict_oof.py')}"
                )
            rows = rows.loc[ids].reset_index()
        return rows, parse_targets(rows["Target"]), combine(stack, *self.how)

    @cached_property
    def cuts(self) -> np.ndarray:
        """Thresholds of the classes, (28,): stage 06's, or 0.5 before it has run."""
        try:
            return np.array(self.thresholds["thresholds"])
        except UserError:
            return np.full(len(CLASS_NAMES), 0.5)

    @cached_property
    def submission_files(self) -> list[Path]:
        """The existing submissions of this work folder: those of --out, the latest last, then submission.csv."""
        paths = [*map(Path, remembered_submissions(self.folder)), self.layout.submission]
        return [path for path in paths if path.is_file()]

    @property
    def submission_file(self) -> Path:
        """The one to show: submission.csv, or the last one of --out."""
        return self.submission_files[-1] if self.submission_files else self.layout.submission

    @cached_property
    def submission(self) -> pd.DataFrame:
        path = self.submission_file
        table = read_table(path, self.layout.command("07_ensemble.py"))
        if "Predicted" not in table:
            raise UserError(
                f"{path} is not the submission that stage 07 wrote; run: {self.layout.command('07_ensemble.py')}"
            )
        return table

    # --- state

    def state(self, path: Path) -> tuple[str, dict]:
        """Return, in words, whether an artifact exists and is up to date with its inputs, and its sidecar."""
        if not sidecar(path).is_file():
            return "unfinished" if path.is_file() else "not made yet", {}
        record = read_sidecar(path)
        now = {name: self.fingerprint(self.input_path(path, record, name)) for name in record["inputs"]}
        older = [name for name, content in now.items() if content and content != record["inputs"][name]]
        gone = [name for name in record.get("files", {}) if not now.get(name)]
        if older:
            return f"from an older {', '.join(older)}: run its stage again", record
        return (
            f"complete; cannot be compared with {', '.join(gone)}, which can no longer be read" if gone else "complete",
            record,
        )

    def input_path(self, artifact: Path, record: dict, name: str) -> Path:
        """Return the path of an artifact's input: from its sidecar, or by its name in the work folder."""
        if name in record.get("files", {}):
            return artifact.parent.resolve() / record["files"][name]
        return self.folder / name
