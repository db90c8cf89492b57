"""Model: the trained networks that predict new images, and all that turns their probabilities into answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.artifacts.layout import Layout
from common.artifacts.stage import digest, fingerprint, read_sidecar, sidecar
from common.classes import CLASS_NAMES
from common.data.sources import CHANNELS
from common.errors import UserError, listing
from common.recipes import Recipe, recipe_of_run, stored_size, to_dict
from common.score.ensemble import combine
from common.score.submission import decide, read_thresholds

if TYPE_CHECKING:  # torch takes seconds to load, and a model can be described without it
    from common.train.dataset import Normalisation
    from common.train.hardware import Hardware
    from common.train.networks import Classifier

SIDE = 2048  # pixels: the side at which `Model.pixel_size` holds
# Settings of stage 05, the defaults first.
VIEWS = {"tta": ("dihedral", "none"), "view": ("whole", "crops"), "checkpoint": ("best", "last")}
PIXEL_SIZE = 0.08  # micrometres, of the competition's images at SIDE
SCORES = (
    "method",
    "score_cross_fitted",
    "interval",
    "score_cross_fitted_present",
    "n_present",
    "score_at_half",
    "score_held_out",
    "interval_held_out",
    "n_held_out",
    "n_samples",
    "per_class",
)


@dataclass(frozen=True)
class Member:
    """One trained network.

    name, fold : of its run
    recipe : it was trained with
    weight : within the model; those of all members have the sum 1
    load : function of the hardware -> the network on its device, and its normalisation; can be pickled
    content : fingerprint of the network
    """

    name: str
    fold: int
    recipe: Recipe
    weight: float
    load: "Callable[[Hardware], tuple[Classifier, Normalisation]]"
    content: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} fold {self.fold}"

    @property
    def side(self) -> int:
        """The side in pixels at which the network sees a whole field of SIDE pixels."""
        return stored_size(self.recipe.store, SIDE)

    @property
    def width(self) -> int | None:
        """How many features there are before the last layer; None if that depends on the encoder."""
        return self.recipe.buffers[-1] if self.recipe.buffers else None


@dataclass(frozen=True, eq=False)
class Reference:
    """How a network sees samples that resemble its training data but were not in it: those of its validation fold.

    ids : (n,); targets : (n,) label texts, for example '2 22'
    embeddings : (n, width) float32, what enters the last layer for the unturned image
    means : (n, 4) float32, of each channel, 0 to 1
    """

    ids: np.ndarray
    targets: np.ndarray
    embeddings: np.ndarray
    means: np.ndarray


@dataclass(frozen=True, eq=False)
class Model:
    """Trained networks and how they decide.

    source : the work folder or package
    pixel_size : micrometres per pixel of the training images at SIDE pixels a side; at another side in proportion
    thresholds : (28,), which apply to `combined` probabilities; None if no stage has found any
    fallback : what is predicted if no class passes: argmax (the most probable one) or empty
    calibration : (28, 3) coefficients for `calibration.calibrated`, of combined probabilities; or None
    scores : what thresholds.json has under the names in SCORES: macro F1 with its interval, and per class; or None
    tta, view : the test-time views that the thresholds were found with, as in stage 05
    reference : label of a member -> how it sees samples like its training data; {} if that is not known
    digest : changes if anything changes that changes answers
    warnings : what the user should know about this model
    """

    name: str
    source: Path
    members: tuple[Member, ...]
    classes: tuple[str, ...] = CLASS_NAMES
    channels: tuple[str, ...] = CHANNELS
    pixel_size: float = PIXEL_SIZE
    thresholds: np.ndarray | None = None
    fallback: str = "argmax"
    calibration: np.ndarray | None = None
    scores: dict | None = None
    tta: str = "dihedral"
    view: str = "whole"
    reference: Mapping[str, Reference] = field(default_factory=dict)
    digest: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of its runs, in order."""
        return list(dict.fromkeys(member.name for member in self.members))

    def combined(self, probs: np.ndarray) -> np.ndarray:
        """Return the model's probabilities, (n, 28) float32, from those of its members, (n_members, n, 28).

        As stages 05 to 07 do: the mean over the folds of each run, then the weighted mean over the runs.
        """
        runs, weights = [], []
        for name in self.names:
            rows = [k for k, member in enumerate(self.members) if member.name == name]
            runs.append(combine(probs[rows], "mean"))
            weights.append(sum(self.members[k].weight for k in rows))
        return combine(np.stack(runs), "weighted", weights)

    def decide(self, probs: np.ndarray) -> np.ndarray:
        """Return the predicted classes, (n, 28) bool, from `combined` probabilities; see `cuts`."""
        return decide(probs, self.cuts, self.fallback)

    @property
    def cuts(self) -> np.ndarray:
        """The thresholds, (28,), or 0.5 where no stage has found any."""
        return np.full(len(self.classes), 0.5) if self.thresholds is None else self.thresholds


@dataclass(frozen=True)
class Choice:
    """Which members to use: runs and folds, by default those that stage 06 scored."""

    runs: Sequence[str] | None = None
    folds: Sequence[int] | None = None


# --- opening -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelReader:
    """One kind of models; a row of READERS_OF_MODELS.

    fits : function of a path -> whether it is one
    open : function of the path and the Choice -> Model; raises UserError
    """

    fits: Callable[[Path], bool]
    open: Callable[[Path, Choice], Model]


def open_model(path: Path, choice: Choice = Choice()) -> Model:
    """Return the model at a path, of any kind in READERS_OF_MODELS; nothing is written there.

    Raises UserError if there is none, or if it lacks what was chosen.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; expected a work folder with trained runs, or a package")
    for reader in READERS_OF_MODELS.values():
        if reader.fits(path):
            return reader.open(path, choice)
    raise UserError(f"{path} is neither a work folder with trained runs nor a package")


def open_work_folder(path: Path, choice: Choice) -> Model:
    """Return the model of a work folder: the networks and weights that stage 06 scored, or those chosen."""
    layout = Layout(path)
    found, warnings = own_thresholds(layout)
    names = list(choice.runs or (found["recipes"] if found else sorted(finished_folds(layout))))
    if not names:
        raise UserError(f"{path} has no finished training; run: {layout.command('04_train.py')}")
    if found and set(names) != set(found["recipes"]):
        warnings.append(
            f"the thresholds are those of {', '.join(found['recipes'])}, not of {', '.join(names)}; for others run: "
            + layout.command("06_thresholds.py", "--recipes", ",".join(names))
        )
    folds = {name: folds_to_use(layout, name, found, choice) for name in names}
    members = [
        make_member(layout, name, fold, weight_of(name, names, found) / len(numbers))
        for name, numbers in folds.items()
        for fold in numbers
    ]
    if found:
        check_same_networks(layout, members)
    else:
        warnings.append(
            "there are no thresholds, so a class is predicted from 0.5, or if it is the most probable one; for "
            f"thresholds run: {layout.command('05_predict_oof.py', '--recipes', ','.join(names))}, then "
            f"{layout.command('06_thresholds.py', '--recipes', ','.join(names))}"
        )
    warnings += [f"{folder} has no finished training and is left out" for folder in unfinished(layout, names, folds)]
    views = views_of(layout, members[0])
    whole = found is not None and set(names) == set(found["recipes"])
    model = Model(
        name=path.resolve().name,
        source=path,
        members=tuple(members),
        **decision_of(found, whole),
        tta=views["tta"],
        view=views["view"],
        warnings=tuple(warnings),
    )
    return with_digest(model)


def decision_of(found: dict | None, whole: bool) -> dict[str, Any]:
    """Return the fields of a Model that say how it decides, and how well.

    found : content of thresholds.json, or None
    whole : whether the model has all networks that it was found for; else its calibration and scores do not hold
    """
    known = found or {}
    return {
        "thresholds": np.array(known["thresholds"]) if found else None,
        "fallback": known.get("fallback", "argmax"),
        "calibration": np.array(known["calibration"]) if whole and "calibration" in known else None,
        "scores": {key: known[key] for key in SCORES if key in known} if found and whole else None,
    }


def with_digest(model: Model) -> Model:
    """Return the model with the digest of its contents."""
    contents = {
        "members": [[m.name, m.fold, to_dict(m.recipe), m.weight, m.content] for m in model.members],
        "thresholds": None if model.thresholds is None else model.thresholds.tolist(),
        "calibration": None if model.calibration is None else model.calibration.tolist(),
        "others": [model.fallback, model.pixel_size, model.tta, model.view],
    }
    return replace(model, digest=digest(contents))


def own_thresholds(layout: Layout) -> tuple[dict | None, list[str]]:
    """Return the content of thresholds.json, or None if it is missing or not for networks of this folder; and warnings.

    Raises UserError for thresholds of ranks, which a few new images do not have.
    """
    if not layout.thresholds.is_file():
        return None, []
    found = read_thresholds(layout.thresholds, None, " ".join(layout.flags()))
    if not all(layout.run(name, 0).parent.is_dir() for name in found["recipes"]):
        return None, [f"{layout.thresholds} is for {', '.join(found['recipes'])}, not for networks of this folder"]
    if found["combine"] == "rank":
        again = layout.command("06_thresholds.py", "--recipes", ",".join(found["recipes"]), "--combine", "mean")
        raise UserError(
            f"{layout.thresholds} is for ranks among many samples (--combine rank), which new images do not have; "
            f"run: {again}"
        )
    return found, []


def finished_folds(layout: Layout) -> dict[str, list[int]]:
    """Return the numbers of each run's folds whose training is finished."""
    found: dict[str, list[int]] = {}
    for path in layout.runs.glob("*/fold*/best.pt.meta.json"):
        number = path.parent.name.removeprefix("fold")
        if number.isdecimal():
            found.setdefault(path.parent.parent.name, []).append(int(number))
    return {name: sorted(numbers) for name, numbers in found.items()}


def folds_to_use(layout: Layout, name: str, found: dict | None, choice: Choice) -> list[int]:
    """Return the folds of a run whose networks predict; raises UserError if one of them is not trained."""
    finished = finished_folds(layout).get(name, [])
    behind = (found or {}).get("folds", {}).get(name)
    numbers = list(choice.folds if choice.folds is not None else behind or finished)
    missing = [fold for fold in numbers if fold not in finished]
    if missing or not numbers:
        train = layout.command(
            "04_train.py", "--recipe", name, *(["--folds", ",".join(map(str, missing))] * bool(missing))
        )
        which = listing(layout.run(name, fold) for fold in missing) if missing else f"  {layout.runs / name}"
        raise UserError(f"these trainings are not finished:\n{which}\nrun: {train}; or choose others with --folds")
    return numbers


def unfinished(layout: Layout, names: list[str], folds: dict[str, list[int]]) -> list[Path]:
    """Return the folders of the runs' trainings that have begun but are not finished."""
    finished = finished_folds(layout)
    return [
        path.parent
        for name in names
        for path in sorted((layout.runs / name).glob("fold*/log.jsonl"))
        if path.parent.name.removeprefix("fold") not in map(str, finished[name])
    ]


def weight_of(name: str, names: list[str], found: dict | None) -> float:
    """Return a run's weight among `names`: stage 06's, brought to the sum 1."""
    weights = dict(zip(found["recipes"], found["weights"], strict=True)) if found else {}
    total = sum(weights.get(other, 0) for other in names)
    return weights[name] / total if total and set(names) <= set(weights) else 1 / len(names)


def make_member(layout: Layout, name: str, fold: int, weight: float) -> Member:
    """Return the network of a finished training."""
    path = layout.network(name, fold)
    recipe = recipe_of_run(read_sidecar(path)["parameters"])
    checkpoint = layout.network(name, fold, views_of(layout, (name, fold))["checkpoint"])
    content = read_sidecar(path)["outputs"].get(checkpoint.name) or fingerprint(checkpoint)
    return Member(name, fold, recipe, weight, partial(load_member, checkpoint.resolve(), recipe), content)


def load_member(path: Path, recipe: Recipe, hardware: "Hardware") -> "tuple[Classifier, Normalisation]":
    """Return the network of a checkpoint on the device, and its normalisation."""
    from common.train.checkpoints import load_network  # loads torch

    return load_network(path, recipe, hardware)


def views_of(layout: Layout, member: Member | tuple[str, int]) -> dict[str, str]:
    """Return the settings of stage 05 for a network: tta, view and checkpoint; the defaults before it has run."""
    name, fold = (member.name, member.fold) if isinstance(member, Member) else member
    path = layout.predictions(name, "oof", fold)
    found = read_sidecar(path)["parameters"] if sidecar(path).is_file() else {}
    return {name: found[name] if found.get(name) in known else known[0] for name, known in VIEWS.items()}


def check_same_networks(layout: Layout, members: list[Member]) -> None:
    """Refuse networks that were trained again after stage 05 predicted what the thresholds were found on."""
    for name in dict.fromkeys(member.name for member in members):
        path = layout.predictions(name, "oof")
        known = read_sidecar(path).get("networks", []) if sidecar(path).is_file() else []
        changed = [member.label for member in members if member.name == name and known and member.content not in known]
        if changed:
            again = layout.command("05_predict_oof.py", "--recipes", name)
            raise UserError(
                f"the thresholds were found before these networks were trained again: {', '.join(changed)}; run: "
                f"{again}, then {layout.command('06_thresholds.py', '--recipes', name)}"
            )


def is_package(path: Path) -> bool:
    from common.predict import package  # imports this module

    return package.is_package(path)


def open_package(path: Path, choice: Choice) -> Model:
    """Return the model of a package; see `package.open_package`."""
    from common.predict import package

    return package.open_package(path, choice)


READERS_OF_MODELS: dict[str, ModelReader] = {
    "work folder": ModelReader(lambda path: (path / "runs").is_dir(), open_work_folder),
    "package": ModelReader(is_package, open_package),
}
