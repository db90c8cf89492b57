"""What a network's training data look like to it, and how far new images are from that.

The reference of a network is how it sees samples of its validation fold, which resemble its training data but were not
in it. An image is unlike them if it is farther from its nearest neighbours among them than nearly all of them are from
theirs (Sun et al. 2022, Out-of-distribution detection with deep nearest neighbors).
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.artifacts.arrays import read_arrays
from common.artifacts.files import writing
from common.artifacts.layout import Layout
from common.artifacts.stage import Stage
from common.data.sources import CHANNELS
from common.errors import UserError
from common.predict.model import Member, Model, Reference

if TYPE_CHECKING:  # it loads torch
    from common.train.hardware import HardwareOptions

N_SAMPLES = 256  # of a network's reference, spread evenly over its validation fold
FEWEST = 10  # samples of a reference that says anything
SMALL = 1e-3  # added to a feature's deviation, which may be 0
QUANTILE = 0.95  # of the reference's own distances: farther images are unlike it
RANGE = 0.99  # share of reference samples that a channel's range of means covers at each end
MARGIN = 2.0  # a channel's mean is out of range if it is this many times beyond


# --- distance ----------------------------------------------------------------------------------------------


def distances(embeddings: np.ndarray, known: np.ndarray, itself: bool = False) -> np.ndarray:
    """Return each row's distance to its nearest neighbour in `known`, (n,), in the deviations of each feature there.

    itself : whether the rows are those of `known`, so that each one's nearest is itself, which does not count
    """
    mean, deviation = known.mean(axis=0), known.std(axis=0) + SMALL
    rows, others = (embeddings - mean) / deviation, (known - mean) / deviation
    square = (rows**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * rows @ others.T
    return np.sqrt(np.maximum(0, np.sort(square, axis=1)[:, int(itself)]))


def unlikeness(embeddings: list[np.ndarray], model: Model) -> np.ndarray | None:
    """Return how far images are from the training data, (n,): above 1, farther than 95 in 100 of the reference.

    embeddings : (n, width) of each member
    The mean over the members that have a reference; None if none has one.
    """
    found = []
    for member, rows in zip(model.members, embeddings, strict=True):
        known = model.reference.get(member.label)
        if known is not None and len(known.ids) >= FEWEST:
            limit = np.quantile(distances(known.embeddings, known.embeddings, itself=True), QUANTILE)
            found.append(distances(rows, known.embeddings) / max(1e-6, limit))
    return np.mean(found, axis=0) if found else None


def outside(means: np.ndarray, model: Model) -> list[str]:
    """Return for each image, in words, which channels are far darker or brighter than in the training data.

    means : (n, 4) of the channels, 0 to 1
    """
    references = [known.means for known in model.reference.values() if len(known.means)]
    if not references:
        return [""] * len(means)
    low, high = np.quantile(np.concatenate(references), (1 - RANGE, RANGE), axis=0)
    texts = []
    for row in means:
        dark = [c for c, value, end in zip(CHANNELS, row, low, strict=True) if value < end / MARGIN]
        bright = [c for c, value, end in zip(CHANNELS, row, high, strict=True) if value > end * MARGIN]
        kinds = {"darker": dark, "brighter": bright}
        texts.append(", ".join(f"{' and '.join(some)} {word}" for word, some in kinds.items() if some))
    return texts


# --- making and reading ------------------------------------------------------------------------------------


def with_reference(model: Model, out: Path, hardware: "HardwareOptions") -> tuple[Model, str]:
    """Return the model with its members' references, and a note if there are none.

    Missing ones are made, which takes a forward pass of N_SAMPLES images for each network. They are kept in the work
    folder, or under `out` if that cannot be written. A model that has them is unchanged.
    """
    if model.reference or not (model.source / "runs").is_dir():
        return model, "" if model.reference else "the model has no record of its training data"
    layout, found = Layout(model.source), {}
    try:
        for member in model.members:
            stage, rows = reference_stage(layout, member, out)
            if not stage.is_current():
                make_reference(layout, member, stage, rows, hardware)
            found[member.label] = read_reference(stage.artifact)
    except UserError as error:
        return model, f"its training images are not available ({error})"
    return replace(model, reference=found), ""


def reference_stage(layout: Layout, member: Member, out: Path) -> tuple[Stage, pd.DataFrame]:
    """Return the stage that makes a member's reference, and the samples that it is made of, with Id and Target."""
    folds = layout.read_folds()
    rows = folds[folds["fold"] == member.fold]
    rows = rows.iloc[np.unique(np.linspace(0, max(0, len(rows) - 1), N_SAMPLES).round().astype(int))]
    path = layout.reference(member.name, member.fold)
    inputs = {"network": member.content, "images": layout.images_digest(member.recipe.store, rows["Id"])}
    stage = Stage("10_predict", path, {"samples": N_SAMPLES}, inputs)
    if not stage.is_current() and not os.access(layout.work, os.W_OK):
        stage = Stage("10_predict", Layout(out).reference(member.name, member.fold), {"samples": N_SAMPLES}, inputs)
    return stage, rows


def make_reference(
    layout: Layout, member: Member, stage: Stage, rows: pd.DataFrame, hardware: "HardwareOptions"
) -> None:
    """Write a member's reference."""
    from common.predict.run import embed_stored  # loads torch

    embeddings, table = (
        embed_stored(layout.work, member, rows, hardware),
        layout.read_store(member.recipe.store, rows["Id"]),
    )
    arrays = {
        "ids": rows["Id"].to_numpy(str),
        "targets": rows["Target"].to_numpy(str),
        "embeddings": embeddings.astype(np.float32),
        "means": table[[f"mean_{c}" for c in CHANNELS]].to_numpy(np.float32),
    }
    with stage.making(wait=True) as record:
        with writing(stage.artifact) as temporary:
            np.savez(temporary, **arrays)
        record.rows = len(rows)


def read_reference(path: Path) -> Reference:
    """Read a member's reference; raises UserError if it is missing or damaged."""
    try:
        arrays: Mapping[str, np.ndarray] = read_arrays(path)
        found = Reference(*(arrays[name] for name in ("ids", "targets", "embeddings", "means")))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it") from None
    if found.embeddings.ndim != 2 or found.means.shape != (len(found.ids), len(CHANNELS)):
        raise UserError(f"{path} is not what 10_predict.py writes; delete it")
    return found
