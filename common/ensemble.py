"""Averages of predictions by Id, and the submission made from them."""

import numpy as np
import pandas as pd

from common.classes import CLASS_NAMES
from common.errors import UserError, listing
from common.labels import format_targets


def align(ids: np.ndarray, probs: np.ndarray, wanted: np.ndarray, name: str) -> np.ndarray:
    """Return the rows of `probs` in the order of `wanted`; raises UserError for missing or further Ids."""
    place = {Id: i for i, Id in enumerate(ids)}
    missing = [Id for Id in wanted if Id not in place]
    further = sorted(set(ids) - set(wanted))
    for what, some in (("lacks", missing), ("has unexpected", further)):
        if some:
            raise UserError(f"{name} {what} {len(some)} Ids:\n{listing(some)}")
    return probs[[place[Id] for Id in wanted]]


def mean_predictions(members: list[tuple[np.ndarray, np.ndarray]], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the Ids of the first member and the plain mean of all members' probabilities (n, 28).

    members : (ids, probs) with the same Ids in any order
    """
    ids = members[0][0]
    total = np.zeros(members[0][1].shape, dtype=np.float64)
    for (member_ids, probs), name in zip(members, names, strict=True):
        total += align(member_ids, probs, ids, name)
    return ids, (total / len(members)).astype(np.float32)


def decide(probs: np.ndarray, thresholds: np.ndarray, fallback: str) -> np.ndarray:
    """Return the predicted classes, (n, 28) bool; where none passes: the most probable one, or none.

    fallback : argmax or empty
    """
    predicted = probs >= thresholds
    if fallback == "argmax":
        none = ~predicted.any(axis=1)
        predicted[none, probs[none].argmax(axis=1)] = True
    return predicted


def submission_table(ids, predicted: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"Id": ids, "Predicted": format_targets(predicted)})


def with_empty_rows(submission: pd.DataFrame, lost: pd.DataFrame) -> pd.DataFrame:
    """Return the submission with an empty prediction for each row of `lost` (Id, place), at its place."""
    rows = submission.to_dict("records")
    for row in lost.sort_values("place").itertuples():
        rows.insert(int(row.place), {"Id": row.Id, "Predicted": ""})
    return pd.DataFrame(rows, columns=submission.columns)


def check_submission(frame: pd.DataFrame, wanted) -> None:
    """Refuse a submission whose Ids are not `wanted` in that order, or whose labels are not 0 to 27."""
    if list(frame["Id"]) != list(wanted):
        raise UserError("the submission's Ids are not those of sample_submission.csv in its order")
    labels = {label for text in frame["Predicted"] for label in text.split()}
    unknown = sorted(labels - {str(c) for c in range(len(CLASS_NAMES))})
    if unknown:
        raise UserError(f"the submission has labels other than 0 to {len(CLASS_NAMES) - 1}: {', '.join(unknown)}")
