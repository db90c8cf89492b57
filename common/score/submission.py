"""The submission: predict classes from probabilities, check them, and compare them with known labels."""

import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.files import read_json, write_json
from common.artifacts.layout import Layout
from common.artifacts.stage import Stage
from common.artifacts.tables import read_table
from common.artifacts.text_tables import BadTable, read_text_table
from common.classes import CLASS_NAMES, N_CLASSES
from common.data.labels import check_samples, format_targets, is_target, parse_targets, read_csv
from common.errors import UserError, listing
from common.score.ensemble import COMBINATIONS, align, combine, stack_members
from common.score.members import (
    check_networks,
    check_origin,
    check_there,
    member_files,
    read_members,
    read_predictions,
    short_names,
)


@dataclass(frozen=True)
class Ensemble:
    """The members of a submission, and how they are combined and decided.

    path : of the thresholds; names, files : of the members
    made_by : the command that makes the files; None where they come from elsewhere
    """

    path: Path
    thresholds: dict
    names: list[str]
    files: list[Path]
    made_by: str | None

    def predict(self, ids: Path | None, wanted: np.ndarray) -> np.ndarray:
        """Return the combined probabilities of the Ids `wanted`, (n, 28); ids : CSV with the Ids of .npy files."""
        members = stack_members(read_members(self.files, ids, self.made_by), self.names, wanted)
        return combine(members, self.thresholds["combine"], self.thresholds["weights"])


def wanted_ids(layout: Layout, order: Path, own: bool) -> np.ndarray:
    """Return the submission's Ids in order: those of the table `order`, or of our own test samples."""
    if not own:
        return read_csv(order)["Id"].to_numpy()
    samples = layout.read_samples()
    return samples.loc[samples["part"] == "test", "Id"].to_numpy()


def find_ensemble(layout: Layout, recipes: list[str], given: list[Path] | None, thresholds: Path | None) -> Ensemble:
    """Return the ensemble of the recipes' test predictions, or of `given` files; raises UserError for a missing part.

    thresholds : where they are, if not in the work folder
    """
    asked = ["--recipes", ",".join(recipes)]
    path = thresholds or layout.thresholds
    makes = "--oof FILES --labels CSV" if given else shlex.join([*layout.flags(), *asked])
    found = read_thresholds(path, None if given else recipes, makes)
    names, files = member_files(given, layout.work, recipes, "test")
    if len(names) != len(found["weights"]):
        raise UserError(
            f"{path} is for {len(found['weights'])} members ({', '.join(found['recipes'])}), found "
            f"{len(names)}: {', '.join(names)}; give the same networks in the same order"
        )
    made_by = None if given else layout.command("05_predict_oof.py", *asked)
    check_there(files, made_by)
    if made_by:
        check_origin(layout.work, recipes, "test")
        check_networks(layout.work, recipes, "test", made_by)
    return Ensemble(path, found, names, files, made_by)


def read_thresholds(path: Path, recipes: list[str] | None, makes: str) -> dict:
    """Read thresholds.json; raises UserError unless it is valid and for these recipes (if given).

    makes : stage 06's flags that make it
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; run: python 06_thresholds.py {makes}")
    thresholds = read_json(path)
    if not isinstance(thresholds, dict):
        raise UserError(f"{path} is not what stage 06 writes; run: python 06_thresholds.py {makes}")
    missing = {"recipes", "combine", "weights", "thresholds"} - set(thresholds)
    if missing:
        raise UserError(f"{path} has no {', '.join(sorted(missing))}; run: python 06_thresholds.py {makes}")
    wrong = impossible_part(thresholds)
    if wrong:
        raise UserError(f"{path}: expected {wrong}; run: python 06_thresholds.py {makes}")
    if recipes and thresholds["recipes"] != recipes:
        raise UserError(f"{path} was made for {','.join(thresholds['recipes'])}; run: python 06_thresholds.py {makes}")
    return thresholds


def impossible_part(thresholds: dict) -> str:
    """Return what was expected of the first part with an impossible value; "" if all are fine."""
    names, weights = thresholds["recipes"], thresholds["weights"]
    expected = {
        "the names of networks as recipes": isinstance(names, list) and all(isinstance(name, str) for name in names),
        f"{N_CLASSES} thresholds from 0 to 1": are_shares(thresholds["thresholds"])
        and len(thresholds["thresholds"]) == N_CLASSES,
        f"combine to be one of {', '.join(COMBINATIONS)}": thresholds["combine"] in COMBINATIONS,
        "one weight from 0 to 1 per network, with sum 1": isinstance(names, list)
        and are_shares(weights)
        and len(weights) == len(names)
        and abs(sum(weights) - 1) < 1e-3,
        "argmax or empty as fallback": thresholds.get("fallback", "argmax") in ("argmax", "empty"),
        "a score_cross_fitted and its interval, from 0 to 1": "interval" not in thresholds
        or are_shares(thresholds["interval"])
        and len(thresholds["interval"]) == 2
        and are_shares([thresholds.get("score_cross_fitted")]),
        "lists of numbers by network as folds": are_folds(thresholds.get("folds", {})),
        f"three numbers for each of {N_CLASSES} classes as calibration": "calibration" not in thresholds
        or are_coefficients(thresholds["calibration"]),
        f"class and positives of {N_CLASSES} classes as per_class, and n_samples": "per_class" not in thresholds
        or are_counts(thresholds["per_class"])
        and is_count(thresholds.get("n_samples"))
        and thresholds["n_samples"] > 0,
    }
    return next((text for text, fine in expected.items() if not fine), "")


def are_shares(values: object) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)


def are_folds(values: object) -> bool:
    return isinstance(values, dict) and all(
        isinstance(numbers, list) and all(map(is_count, numbers)) for numbers in values.values()
    )


def are_coefficients(rows: object) -> bool:
    return (
        isinstance(rows, list)
        and len(rows) == N_CLASSES
        and all(isinstance(row, list) and len(row) == 3 for row in rows)
        and all(type(value) in (int, float) and abs(value) < 1e300 for row in rows for value in row)
    )


def are_counts(rows: object) -> bool:
    return (
        isinstance(rows, list)
        and len(rows) == N_CLASSES
        and all(
            isinstance(row, dict) and isinstance(row.get("class"), str) and is_count(row.get("positives"))
            for row in rows
        )
    )


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def decide(probs: np.ndarray, thresholds: np.ndarray, fallback: str) -> np.ndarray:
    """Return the predicted classes, (n, 28) bool; if none passes: the most probable one, or none.

    fallback : argmax or empty
    """
    predicted = probs >= thresholds
    if fallback == "argmax":
        none = ~predicted.any(axis=1)
        predicted[none, probs[none].argmax(axis=1)] = True
    return predicted


def known_labels(pairs: pd.DataFrame, ids: np.ndarray) -> pd.DataFrame:
    """Return the nearest near-identical labelled sample of each test sample in `ids`: Id, other_Id, bits, Target.

    pairs : stage 02's duplicate_pairs.csv; bits : distance over the three channels
    """
    turned = {"Id": "other_Id", "part": "other_part", "Target": "other_Target"}
    both = pd.concat([pairs, pairs.rename(columns=turned | {new: old for old, new in turned.items()})])
    found = both[(both["part"] == "test") & (both["other_part"] != "test") & both["Id"].isin(ids)]
    found = found.assign(bits=found[["red", "green", "blue"]].sum(axis=1)).sort_values("bits", kind="stable")
    found = found.drop_duplicates("Id")[["Id", "other_Id", "bits", "other_Target"]]
    return found.rename(columns={"other_Target": "Target"})


def override(predicted: np.ndarray, ids: np.ndarray, known: pd.DataFrame) -> np.ndarray:
    """Return the predictions, with those of the Ids in `known` (Id, Target) replaced by its labels."""
    place, result = {Id: i for i, Id in enumerate(ids)}, predicted.copy()
    result[[place[Id] for Id in known["Id"]]] = parse_targets(known["Target"])
    return result


def frequency_table(predicted: np.ndarray, per_class: list[dict], n_samples: int) -> str:
    """Return a table: how often each class is predicted, beside its share of labelled samples; most different first.

    per_class, n_samples : as in thresholds.json
    """
    called = predicted.mean(axis=0)
    known = np.array([row["positives"] for row in per_class]) / n_samples
    ratio = np.divide(called, known, out=np.full(len(known), np.inf), where=known > 0)
    ratio[(known == 0) & (called == 0)] = 1
    with np.errstate(divide="ignore"):
        order = np.argsort(-np.abs(np.log(ratio)), kind="stable")
    lines = [f"  {'class':30s} {'predicted':>9s} {'share':>7s} {'labelled':>9s} {'ratio':>6s}"]
    return "\n".join(
        lines
        + [
            f"  {per_class[c]['class']:30s} {predicted[:, c].sum():9d} {called[c]:7.2%} {known[c]:9.2%} {ratio[c]:6.2f}"
            for c in order
        ]
    )


def describe_submission(
    path: Path,
    predicted: np.ndarray,
    thresholds: dict,
    names: list[str],
    known: pd.DataFrame | None,
    lost: pd.DataFrame | list,
) -> list[str]:
    """Return lines that describe what was written, from what, and which rows are not predictions.

    predicted : (n, 28) without the `lost` rows (Id, place; or an empty list); known : the table for `override`, or None
    """
    score = ""
    if "interval" in thresholds:
        low, high = thresholds["interval"]
        score = f"; cross-fitted out-of-fold macro F1 {thresholds['score_cross_fitted']:.3f} [{low:.3f}, {high:.3f}]"
    lines = [
        f"{path}: {len(predicted) + len(lost)} rows, {predicted.sum(axis=1).mean():.2f} labels per row, "
        f"{predicted.any(axis=0).sum()} classes; {thresholds['combine']} of {', '.join(names)}{score}"
    ]
    if "per_class" in thresholds:
        lines.append(frequency_table(predicted, thresholds["per_class"], thresholds["n_samples"]))
    if known is not None:
        lines.append(
            f"WARNING: --override-duplicates: {len(known)} rows are NOT predictions but the labels of near-identical "
            f"labelled samples:\n{listing(known['Id'] + '  <-  ' + known['other_Id'] + '  ' + known['Target'])}"
        )
    if isinstance(lost, pd.DataFrame) and len(lost):
        lines.append(
            f"warning: stage 01 left out {len(lost)} test samples, which have empty rows:\n{listing(lost['Id'])}"
        )
    return lines


def check_out(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write a submission over a folder or over one of its own inputs."""
    if out.is_dir() or out.resolve() in [path.resolve() for path in inputs]:
        raise UserError(f"--out {out} is {'a folder' if out.is_dir() else 'one of the inputs'}; give another file")


def remember_submission(work: Path, out: Path) -> None:
    """Record in a work folder a submission that is written elsewhere, so that the page finds it.

    A folder that cannot be written to (published thresholds, say) gets no record: no page is made in it either.
    """
    path = str(out.resolve())
    others = [other for other in remembered_submissions(work) if other != path]
    if out.resolve() != Layout(work).submission.resolve() and os.access(work, os.W_OK):
        write_json(Layout(work).submissions, [*others, path])


def remembered_submissions(work: Path) -> list[str]:
    """Return the paths of the submissions that stage 07 wrote outside of a work folder, the latest last."""
    path = Layout(work).submissions
    found = read_json(path) if path.is_file() else []
    if not (isinstance(found, list) and all(isinstance(place, str) and "\0" not in place for place in found)):
        raise UserError(f"{path} is not a list of paths; delete it")
    return found


def submission_table(ids: Iterable[str], predicted: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"Id": ids, "Predicted": format_targets(predicted)})


def left_out_samples(path: Path) -> pd.DataFrame:
    """Return the test samples that stage 01 left out, from its left_out.csv if there is one: Id, place."""
    none = pd.DataFrame({"part": [], "Id": [], "place": []})
    lost = read_table(path, Layout(path.parent).preprocess_command()) if path.is_file() else none
    return lost.loc[lost["part"] == "test", ["Id", "place"]]


def with_empty_rows(submission: pd.DataFrame, lost: pd.DataFrame) -> pd.DataFrame:
    """Return the submission with an empty prediction for each row of `lost` (Id, place) inserted at its place."""
    rows = submission.to_dict("records")
    for row in lost.sort_values("place").itertuples():
        rows.insert(int(row.place), {"Id": row.Id, "Predicted": ""})
    return pd.DataFrame(rows, columns=submission.columns)


def read_submission(path: Path) -> pd.DataFrame:
    """Read a submission as strictly as Kaggle does: exactly the columns Id and Predicted; else raises UserError."""

    def exactly(header: list[str]) -> dict:
        if header != ["Id", "Predicted"]:
            cure = (
                "; pandas adds a column of row numbers unless to_csv gets index=False"
                if header[0] in ("", "Unnamed: 0")
                else ""
            )
            raise BadTable(
                f"has {len(header)} columns ({', '.join(map(repr, header))}), expected exactly Id,Predicted{cure}"
            )
        return {}

    if not path.is_file():
        raise UserError(f"{path} is missing; expected a submission with the columns Id,Predicted")
    try:
        frame = read_text_table(path, exactly, plain=True)
    except BadTable as error:
        raise UserError(f"{path} {error}") from None
    check_samples(frame["Id"], path)
    return frame


def check_submission(frame: pd.DataFrame, wanted: Iterable[str]) -> None:
    """Refuse a submission whose Ids are not `wanted` in that order, or with invalid labels.

    Labels are 0 to 27, each at most once per row, separated by single blanks.
    """
    found, wanted = list(frame["Id"]), list(wanted)
    if found != wanted:
        if sorted(found) == sorted(wanted):
            raise UserError("the submission's Ids are not in the order of sample_submission.csv")
        raise UserError(
            "the submission's Ids are not those of sample_submission.csv; "
            f"missing: {len(set(wanted) - set(found))}, unexpected: {len(set(found) - set(wanted))}, "
            f"repeated: {len(found) - len(set(found))}"
        )
    wrong = [
        f"{row.Id}: {row.Predicted!r}"
        for row in frame.itertuples()
        if row.Predicted and not is_prediction(row.Predicted)
    ]
    if wrong:
        raise UserError(
            f"the submission must have labels 0 to {N_CLASSES - 1}, each at most once per row, separated by single "
            f"blanks; found:\n{listing(wrong)}"
        )


def is_prediction(text: str) -> bool:
    labels = text.split(" ")
    return (
        is_target(text)
        and all(re.fullmatch("0|[1-9][0-9]?", label) for label in labels)
        and len(set(labels)) == len(labels)
    )


def reproduce(layout: Layout, oof: list[Path] | None, ids: Path | None, path: Path) -> None:
    """Write and print the thresholds that make the submission `path` from the one file of predictions.

    oof : the file; ids : CSV with the Ids of a .npy file
    """
    if not oof or len(oof) != 1:
        raise UserError("--reproduce needs the one predictions file that the submission was made from: --oof FILE")
    submission = read_submission(path)
    check_submission(submission, submission["Id"])
    found_ids, probs = read_predictions(oof[0], ids)
    (name,) = short_names(oof)
    inputs = {name: oof[0], "submission": path, **({"ids": ids} if ids else {})}
    stage = Stage("06_thresholds", layout.thresholds, {"reproduce": True}, inputs)
    if stage.is_current():
        return stage.say_current()
    result = recover(align(found_ids, probs, submission["Id"].to_numpy(), str(oof[0])), submission)
    with stage.making() as record:
        write_json(stage.artifact, {"recipes": [name], "combine": "mean", "weights": [1.0], **result})
        record.rows = len(found_ids)
    print(
        f"06_thresholds: {stage.artifact}: these thresholds and the fallback {result['fallback']} reproduce all "
        f"{len(found_ids)} rows of {path}\n  " + " ".join(f"{value:g}" for value in result["thresholds"])
    )


def recover(probs: np.ndarray, frame: pd.DataFrame) -> dict:
    """Find thresholds with which `probs` make exactly the submission `frame` (same order).

    Returns plain types for thresholds.json.
    limits : [low, high] of each class; every threshold with low < threshold <= high makes it
    Raises UserError if no thresholds make it.
    """
    predicted = parse_targets(frame["Predicted"])
    fallback = "argmax" if predicted.any(axis=1).all() else "empty"
    thresholds, low, high = recover_thresholds(probs, predicted, fallback)
    wrong = (decide(probs, thresholds, fallback) != predicted).sum(axis=0)
    if wrong.any():
        found = [
            f"{CLASS_NAMES[c]}: {wrong[c]} samples; predicted down to {high[c]:.6f}, not predicted up to {low[c]:.6f}"
            for c in np.flatnonzero(wrong)
        ]
        raise UserError(
            f"no thresholds make this submission from these probabilities; contradicting classes:\n{listing(found)}"
        )
    return {
        "method": "reproduced",
        "thresholds": thresholds.tolist(),
        "fallback": fallback,
        "limits": np.stack([low, high], axis=1).tolist(),
        "n_samples": len(probs),
    }


def recover_thresholds(
    probs: np.ndarray, predicted: np.ndarray, fallback: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find thresholds with which `probs` give exactly the cells of `predicted`; three arrays of shape (n_classes,).

    fallback : argmax or empty, for rows in which no class passes
    Returns the thresholds and their limits: every threshold with low < threshold <= high gives the same cells. If no
    threshold reproduces a class, it has low >= high. A row whose only class is its most probable one says nothing
    about the threshold: below the threshold, the fallback would predict that class too.
    """
    telling = predicted.copy()
    if fallback == "argmax":
        alone = np.flatnonzero(predicted.sum(axis=1) == 1)
        telling[alone, probs[alone].argmax(axis=1)] = False
    low = np.where(predicted, -np.inf, probs).max(axis=0).astype(np.float64)
    high = np.where(telling, probs, 1.0).min(axis=0).astype(np.float64)
    return np.array([shortest_decimal(*limits) for limits in zip(low, high, strict=True)]), low, high


def shortest_decimal(low: float, high: float) -> float:
    """Return the number with the fewest decimals, up to ten, in (low, high]; high if there is none."""
    for digits in range(1, 11):
        value = np.floor(high * 10**digits) / 10**digits
        if low < value <= high:
            return float(value)
    return float(high)
