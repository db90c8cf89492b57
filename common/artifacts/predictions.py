"""Probabilities on disk: stored with their Ids, and checked when written and when read."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from common.artifacts.arrays import read_arrays
from common.artifacts.files import writing
from common.artifacts.text_tables import composed
from common.classes import CLASS_NAMES
from common.errors import UserError, listing

ROUNDING = 1e-5  # a sum of float32 probabilities may be this far above 1


def check_probabilities(ids: ArrayLike, probs: ArrayLike, name: object) -> np.ndarray:
    """Return the probabilities, clipped to [0, 1] where rounding put them outside.

    Raises UserError for repeated Ids, a wrong shape, NaN and values farther outside.
    """
    ids, probs = np.asarray(ids), np.asarray(probs)
    if probs.shape != (len(ids), len(CLASS_NAMES)):
        raise UserError(
            f"{name}: expected probabilities of shape ({len(ids)}, {len(CLASS_NAMES)}), found {probs.shape}"
        )
    wrong = ~((probs >= -ROUNDING) & (probs <= 1 + ROUNDING))  # NaN is neither
    if wrong.any():
        rows = np.flatnonzero(wrong.any(axis=1))
        cells = [(i, wrong[i].argmax()) for i in rows[:10]]
        found = [
            f"{ids[i]}: {np.format_float_positional(probs[i, c], trim='-')} for {CLASS_NAMES[c]}" for i, c in cells
        ]
        raise UserError(
            f"{name}: expected probabilities in [0, 1], found NaN or values outside in {len(rows)} rows, "
            f"for example:\n{listing(found)}"
        )
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{name}: these Ids appear more than once:\n{listing(values[counts > 1])}")
    return np.clip(probs, 0, 1)


def save_predictions(path: Path, ids: ArrayLike, probs: ArrayLike) -> None:
    """Write `ids (n,)`, `probs (n, 28) float32` in [0, 1] and `classes (28,)` as one .npz."""
    ids, probs = np.asarray(ids, dtype=str), np.asarray(probs, dtype=np.float32)
    probs = check_probabilities(ids, probs, path)
    with writing(path) as temporary:
        np.savez(temporary, ids=ids, probs=probs, classes=np.array(CLASS_NAMES))


def load_predictions(path: Path, made_by: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return `ids (n,)` and `probs (n, 28)` of a file written by `save_predictions`, checked again.

    made_by : the command that makes it; None if the file comes from elsewhere
    """
    cure = f"run: {made_by}" if made_by else "expected what stage 05 writes, or a .csv file with Id and 28 columns"
    if not Path(path).is_file():
        raise UserError(f"{path} is missing; {cure}")
    try:
        arrays = read_arrays(path)
        ids, probs, classes = arrays["ids"], arrays["probs"], arrays["classes"].tolist()
        if ids.ndim != 1 or ids.dtype.kind != "U" or probs.dtype.kind != "f":
            raise ValueError(f"ids {ids.shape} of {ids.dtype}, probs {probs.shape} of {probs.dtype}")
        ids = np.array([composed(Id) for Id in ids.tolist()], dtype=str)  # raises for invalid text
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a predictions file ({error}); {cure}") from None
    if classes != list(CLASS_NAMES):
        raise UserError(f"{path} was made for other classes; {cure}")
    return ids, check_probabilities(ids, probs, path)
