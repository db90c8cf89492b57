"""Read predictions and groups of any origin: our .npz, CSV with Id and 28 columns, .npy with a CSV of Ids."""

import os
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.arrays import read_arrays
from common.artifacts.layout import Layout
from common.artifacts.predictions import check_probabilities, load_predictions
from common.artifacts.stage import fingerprint, read_sidecar, sidecar
from common.artifacts.text_tables import BadTable, read_text_table
from common.classes import CLASS_NAMES, N_CLASSES
from common.data.folds import HOLD_OUT, fold_numbers
from common.data.labels import check_samples, read_csv
from common.errors import UserError, listing


def member_files(given: list[Path] | None, work: Path, recipes: list[str], part: str) -> tuple[list[str], list[Path]]:
    """Return the names and files of the members: the given files, else the recipes' predictions of a part."""
    if given and len(set(map(os.path.abspath, given))) < len(given):
        raise UserError(f"expected each file once, found {', '.join(map(str, given))}")
    if given:
        return short_names(given), given
    return recipes, [Layout(work).predictions(name, part) for name in recipes]


def short_names(paths: list[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart, with equally many parts: a/oof.npz, b/oof.npz."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    ends = ([str(Path(*part[-n:])) for part in parts] for n in range(1, max(map(len, parts)) + 1))
    return next(names for names in ends if len(set(names)) == len(names))


def check_there(paths: list[Path], made_by: str | None) -> None:
    """Refuse predictions that are missing."""
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path} is missing; "
                + (f"run: {made_by}" if made_by else "expected predictions as .npz, .csv or .npy")
            )


def check_networks(work: Path, recipes: list[str], part: str, made_by: str) -> None:
    """Refuse predictions of a part if a network was retrained between these and the out-of-fold predictions."""
    for name in recipes:
        path, oof = Layout(work).predictions(name, part), Layout(work).predictions(name, "oof")
        these, those = (
            set(read_sidecar(file).get("networks", ())) if sidecar(file).is_file() else set() for file in (path, oof)
        )
        if these and those and not (these <= those or those <= these):
            raise UserError(
                f"{path} and {oof} come from different networks: a fold was retrained in between; run: {made_by}"
            )


def check_origin(work: Path, recipes: list[str], part: str) -> None:
    """Refuse predictions of a part that stage 05 did not write, or whose networks are not those of now.

    Scores of networks that were trained on changed folds or labels would not be out of fold.
    """
    layout = Layout(work)
    for name in recipes:
        path, again = layout.predictions(name, part), layout.command("05_predict_oof.py", "--recipes", name)
        if not sidecar(path).is_file():
            raise UserError(f"{path} has no record of what it was made from ({sidecar(path).name}); run: {again}")
        meta = read_sidecar(path)
        if fingerprint(path) != meta["outputs"].get(path.name):
            raise UserError(f"{path} is not the file that stage 05 wrote; run: {again}")
        for fold in meta["parameters"].get("folds", []):
            network = layout.network(name, fold)
            trained = read_sidecar(network)["inputs"].get("folds.csv") if sidecar(network).is_file() else None
            if trained and trained != fingerprint(layout.folds):
                train = layout.command("04_train.py", "--recipe", name, "--folds", fold, "--force")
                raise UserError(
                    f"{path} comes from networks that were trained on another {layout.folds}, for example {network}; "
                    f"run: {train}, then {again}"
                )
            if trained and is_older(layout.predictions(name, part, fold), network):
                raise UserError(f"{path} is of an earlier training of fold {fold} of {name}; run: {again}")


def is_older(predictions: Path, network: Path) -> bool:
    """Tell whether one fold's predictions are those of an earlier best network than the finished training's."""
    record = read_sidecar(predictions) if sidecar(predictions).is_file() else {"parameters": {}}
    now = read_sidecar(network)["outputs"].get(network.name)
    return record["parameters"].get("checkpoint") == "best" and record["inputs"].get("network") != now


def folds_behind(work: Path, recipes: list[str], part: str) -> dict:
    """Return which folds each recipe's predictions of a part are based on, and how many folds there are.

    As plain types for JSON files: {"folds": {recipe: [numbers]}, "n_folds": number}.
    """
    folds = Layout(work).read_folds()
    files = {name: Layout(work).predictions(name, part) for name in recipes}
    return {
        "folds": {
            name: read_sidecar(path)["parameters"].get("folds", []) if sidecar(path).is_file() else []
            for name, path in files.items()
        },
        "n_folds": len(fold_numbers(folds)),
    }


def describe_folds(numbers: list[int], n_folds: int) -> str:
    """Describe how many of the folds a file is based on."""
    share = "all" if len(numbers) == n_folds else f"{len(numbers)} of"
    return f"is based on {share} {n_folds} folds ({', '.join(map(str, numbers))})"


def describe_missing_folds(behind: dict, work: Path) -> list[str]:
    """Return a line for each recipe whose predictions are not based on all folds, or one line if all are.

    behind : see `folds_behind`
    """
    lines = []
    for name, numbers in behind["folds"].items():
        if len(numbers) < behind["n_folds"]:
            missing = ",".join(str(fold) for fold in range(behind["n_folds"]) if fold not in numbers)
            flags = f"--work {work} --folds {missing}"
            lines.append(
                f"warning: {name} {describe_folds(numbers, behind['n_folds'])}; for the others run: "
                f"python 04_train.py {flags} --recipe {name} && python 05_predict_oof.py {flags} --recipes {name}"
            )
    return lines or [f"each recipe is based on all {behind['n_folds']} folds"]


def held_out_files(work: Path, recipes: list[str], folds: pd.DataFrame, made_by: str) -> dict[str, Path]:
    """Return the existing predictions of the recipes, by name, of the part that folds.csv holds out."""
    if not (folds["fold"] == HOLD_OUT).any():
        return {}
    check_networks(work, recipes, "held_out", made_by)
    files = {f"{name} held out": Layout(work).predictions(name, "held_out") for name in recipes}
    return {name: path for name, path in files.items() if path.is_file()}


def labelled_rows(labelled: pd.DataFrame, ids: Collection[str], made_by: str) -> pd.DataFrame:
    """Return the rows of the label table with the given Ids, in their order."""
    labelled = labelled.set_index("Id")
    unknown = [Id for Id in ids if Id not in labelled.index]
    if unknown:
        raise UserError(f"the predictions have Ids that are not in folds.csv; run: {made_by}\n{listing(unknown)}")
    return labelled.loc[ids]


def read_members(paths: list[Path], ids: Path | None, made_by: str | None) -> list[tuple]:
    """Return the Ids and probabilities of each file: stage 05's if `made_by` is given, else of any origin."""
    return [load_predictions(path, made_by) if made_by else read_predictions(path, ids) for path in paths]


def read_predictions(path: Path, ids: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the Ids (n,) and probabilities (n, 28) of a file; raises UserError for anything else.

    ids : CSV file whose column Id names the rows of a .npy
    """
    check_there([path], None)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return load_predictions(path, None)
    if suffix == ".csv":
        return read_prediction_table(path)
    if suffix != ".npy":
        raise UserError(f"{path}: expected predictions as .npz, .csv or .npy")
    if ids is None:
        raise UserError(f"{path} has no Ids; name a CSV file with a column Id in the order of its rows: --ids CSV")
    try:
        probs = read_arrays(path)[""]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable array ({error})") from None
    return checked(path, read_csv(ids)["Id"].to_numpy(str), probs)


def read_prediction_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a CSV file with Id and 28 columns of probabilities."""
    try:
        frame = read_text_table(path, lambda header: dict.fromkeys(probability_columns(path, header), float))
    except BadTable as error:
        raise UserError(f"{path} {error}") from None
    check_samples(frame["Id"], path)
    columns = in_label_order(path, probability_columns(path, list(frame.columns)))
    return checked(path, frame["Id"].to_numpy(str), frame[columns].to_numpy())


def probability_columns(path: Path, header: list[str]) -> list[str]:
    """Return the 28 columns other than Id."""
    columns = [name for name in header if name != "Id"]
    if "Id" not in header or len(columns) != N_CLASSES:
        raise UserError(
            f"{path}: expected the column Id and {N_CLASSES} columns of probabilities, found "
            f"{'' if 'Id' in header else 'no '}Id and {len(columns)} others: {', '.join(map(repr, header[:5]))} ..."
        )
    return columns


def in_label_order(path: Path, columns: list[str]) -> list[str]:
    """Return the columns in the order of their labels, read from class names or numbers at the end (0, p0, class_0)."""
    numbers = [re.search(r"(\d+)$", name) for name in columns]
    labels = [
        CLASS_NAMES.index(name) if name in CLASS_NAMES else int(number[1]) if number else None
        for name, number in zip(columns, numbers, strict=True)
    ]
    if sorted(label for label in labels if label is not None) != list(range(N_CLASSES)):
        raise UserError(
            f"{path}: expected columns named by class or label, for example Nucleoplasm, 0 or p0; found:\n"
            f"{listing(columns)}"
        )
    return [columns[labels.index(c)] for c in range(N_CLASSES)]


def checked(path: Path, ids: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if probs.dtype.kind not in "fiu":
        raise UserError(f"{path}: expected numbers, found {probs.dtype}")
    return ids, check_probabilities(ids, probs, path).astype(np.float32, copy=False)


def read_groups(path: Path, ids: np.ndarray) -> np.ndarray:
    """Return the group of each Id, (n,), from a CSV file Id,group like stage 02's duplicates.csv."""
    group = read_csv(path, "group").set_index("Id")["group"]
    missing = [Id for Id in ids if Id not in group.index]
    if missing:
        raise UserError(f"{path}: {len(missing)} missing Ids:\n{listing(missing)}")
    group = group.loc[ids]
    if (group == "").any():
        raise UserError(f"{path} has no group for {(group == '').sum()} Ids:\n{listing(group.index[group == ''])}")
    return group.to_numpy()
