"""What a fold is trained and validated on: images, targets, class counts and normalisation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.layout import Layout
from common.data.folds import class_counts, fold_numbers, training_rows
from common.data.images import CHANNELS
from common.data.labels import parse_targets
from common.errors import UserError
from common.recipes import Recipe
from common.train.dataset import STANDARD_DEVIATION, STANDARD_MEAN, ImageSet, Normalisation


@dataclass(frozen=True)
class FoldData:
    """The images of one fold: training rows with copies, validation rows, class counts, normalisation."""

    train: ImageSet
    valid: ImageSet
    counts: np.ndarray  # (28,) distinct training samples of each class
    normalisation: Normalisation


def known_folds(work: Path, folds: pd.DataFrame, numbers: list[int]) -> None:
    """Refuse fold numbers that stage 03's table does not have."""
    known = fold_numbers(folds)
    for fold in numbers:
        if fold not in known:
            raise UserError(f"there is no fold {fold}; {Layout(work).folds} has the folds {', '.join(map(str, known))}")


def load_fold(
    work: Path, folds: pd.DataFrame, fold: int, recipe: Recipe, normalisation: Normalisation | None = None
) -> FoldData:
    """Return the data of one fold of stage 03's table; normalised by its own statistics unless given others.

    Standardised images are brought to mean 0 and deviation 1.
    """
    targets = parse_targets(folds["Target"])
    train, valid = training_rows(folds, fold), (folds["fold"] == fold).to_numpy()
    rows = np.repeat(np.flatnonzero(train), folds["copies"].to_numpy()[train])
    if len(rows) < 2:
        raise UserError(f"fold {fold} leaves {len(rows)} samples to train on; give more data or fewer folds")
    ids, folder = folds["Id"].to_numpy(), Layout(work).store(recipe.store)
    stored = Layout(work).read_store(recipe.store, ids[train])
    if recipe.standardised:
        normalisation = Normalisation((STANDARD_MEAN / 255,) * 4, (STANDARD_DEVIATION / 255,) * 4)
    elif normalisation is None:
        normalisation = measured_normalisation(stored)
    return FoldData(
        ImageSet(
            folder,
            ids[rows],
            targets[rows],
            recipe.crop,
            crcs=dict(stored[["Id", "crc"]].to_numpy()),
            standardised=recipe.standardised,
            augmentations=recipe.augmentations,
        ),
        image_set(work, recipe, folds[valid]),
        class_counts(folds, fold),
        normalisation,
    )


def measured_normalisation(statistics: pd.DataFrame) -> Normalisation:
    """Return mean and spread of all pixels together: within images and between them."""
    mean = [float(statistics[f"mean_{c}"].mean()) for c in CHANNELS]
    std = [
        float(np.sqrt((statistics[f"std_{c}"] ** 2 + statistics[f"mean_{c}"] ** 2).mean() - m**2))
        for c, m in zip(CHANNELS, mean, strict=True)
    ]
    return Normalisation(tuple(mean), tuple(max(value, 1e-3) for value in std))


def training_inputs(work: Path, folds: pd.DataFrame, recipe: Recipe) -> dict:
    """Return the fingerprints of all that a training reads, but pretrained weights."""
    return {"folds.csv": Layout(work).folds, "images": Layout(work).images_digest(recipe.store, folds["Id"])}


def image_set(work: Path, recipe: Recipe, rows: pd.DataFrame) -> ImageSet:
    """Return the whole stored images of a table with Id and Target."""
    stored = Layout(work).read_store(recipe.store, rows["Id"])
    return ImageSet(
        Layout(work).store(recipe.store),
        rows["Id"].to_numpy(),
        parse_targets(rows["Target"]),
        sides=stored["side"].to_numpy(),
        crcs=dict(stored[["Id", "crc"]].to_numpy()),
        standardised=recipe.standardised,
    )
