"""Read the competition's CSV files: Ids and label sets, all of them checked."""

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.tables import check_ids
from common.artifacts.text_tables import BadTable, read_text_table
from common.classes import CLASS_NAMES, N_CLASSES
from common.errors import UserError, listing


def read_csv(path: Path, *columns: str) -> pd.DataFrame:
    """Read `Id` and other columns of a CSV file as text and check the Ids.

    Raises UserError for a missing or empty file, missing columns, repeated Ids, and Ids that are not plain
    file names (an Id becomes part of a path, so it must not lead out of its folder).
    """
    wanted = ["Id", *columns]
    if not path.is_file():
        raise UserError(
            f"{path} is missing; expected a CSV file with the column{'s' * (len(wanted) > 1)} {','.join(wanted)}"
        )
    try:
        frame = read_text_table(path)
    except BadTable as error:
        raise UserError(f"{path} {error}") from None
    missing = [name for name in wanted if name not in frame]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}; its columns are {', '.join(map(repr, frame.columns))}")
    check_samples(frame["Id"], path)
    return frame[wanted]


def check_samples(ids: pd.Series, path: Path) -> None:
    """Refuse a CSV file without rows, with repeated Ids or with Ids that are not plain file names."""
    if ids.empty:
        raise UserError(f"{path} has no rows; expected one per sample")
    check_ids(ids, path)
    repeated = ids[ids.duplicated()].unique()
    if len(repeated):
        raise UserError(f"{path} has Ids that appear more than once:\n{listing(repeated)}")


def read_labels(path: Path) -> pd.DataFrame:
    """Read `Id,Target` and check that every Target is one or more labels 0 to 27 separated by spaces."""
    frame = read_csv(path, "Target")
    wrong = [f"{row.Id}: {row.Target!r}" for row in frame.itertuples() if not is_target(row.Target)]
    if wrong:
        raise UserError(
            f"{path}: Target must be labels 0 to {N_CLASSES - 1} separated by spaces, found:\n{listing(wrong)}"
        )
    return frame


def is_target(text: str) -> bool:
    labels = text.split()
    return bool(labels) and all(re.fullmatch(r"[0-9]{1,2}", label) and int(label) < N_CLASSES for label in labels)


def parse_targets(texts: Collection[str]) -> np.ndarray:
    """Return label texts (for example '22 2') as a bool array, (n_samples, 28); raises UserError for other texts."""
    wrong = [repr(text) for text in texts if text and not is_target(text)]
    if wrong:
        raise UserError(f"expected labels 0 to {N_CLASSES - 1} separated by spaces, found:\n{listing(wrong)}")
    targets = np.zeros((len(texts), N_CLASSES), dtype=bool)
    for row, text in enumerate(texts):
        targets[row, [int(label) for label in text.split()]] = True
    return targets


def format_targets(targets: np.ndarray) -> list[str]:
    """Return a bool array of shape (n_samples, 28) as label texts, for example '2 22'."""
    return [" ".join(map(str, np.flatnonzero(row))) for row in targets]


def absent_classes(targets: np.ndarray) -> list[str]:
    """Return the names of the classes without a positive sample."""
    return [CLASS_NAMES[c] for c in np.flatnonzero(~targets.any(axis=0))]


def class_shares(path: Path) -> np.ndarray:
    """Return the share of a label file's samples that each class has, (n_classes,)."""
    return parse_targets(read_labels(path)["Target"]).mean(axis=0)
