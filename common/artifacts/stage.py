"""Files that stages hand on: written whole or not at all, with a sidecar that says what they were made from.

A stage's main output `X` gets `X.meta.json` (stage, parameters, fingerprints of inputs and outputs, paths of inputs, rows,
seconds) after every output is in place. No sidecar = unfinished; a different one = stale.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from common.artifacts.arrays import read_arrays
from common.artifacts.files import write_json, writing
from common.artifacts.locks import Lock
from common.artifacts.text_tables import BadTable, composed, read_text_table
from common.classes import CLASS_NAMES
from common.errors import UserError, command, listing
from common.recipes import store_settings

STATISTICS = " ".join(
    f"{value}_{channel}~"
    for value in ("mean", "std", "zeros", "saturated")
    for channel in ("red", "green", "blue", "yellow")
)
# What stages write into their tables: text, whole numbers (#), and numbers (~), which may be unknown.
COLUMNS = {
    "samples.csv": "Id part Target side#",
    "images": f"Id side# crc {STATISTICS}",
    "left_out.csv": "Id part Target place#",
    "duplicates.csv": "Id part Target near_group group kept#",
    "folds.csv": "Id Target part group fold# copies#",
    "duplicate_pairs.csv": "Id part Target other_Id other_part other_Target red# green# blue# agreement~",
    "lr_find.csv": "learning_rate~ loss~ smoothed~",
    "hard_classes.csv": "class ranked# kept#",
    "hard_samples.csv": "Id Target share_kept~ mean_loss~",
    "gains.csv": "model column gain~ low~ high~ paper~",
    "submission.csv": "Id Predicted",
}
KINDS = {"#": int, "~": float}
ROUNDING = 1e-5  # a sum of float32 probabilities may be this far above 1


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    with writing(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run its stage again") from None


def read_lines(path: Path) -> list[dict]:
    """Read a file of JSON lines; a damaged one is a UserError that names it."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train its fold again") from None


def read_table(path: Path, made_by: str) -> pd.DataFrame:
    """Read a CSV artifact with text kept as text; say which command makes it where it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; run: {made_by}")
    columns = COLUMNS.get("images" if path.parent.name == "images" else path.name, "").split()
    kinds = {name.rstrip("#~"): KINDS.get(name[-1]) for name in columns}

    def kinds_of(header: list[str]) -> dict[str, type]:
        lacking = [name for name in kinds if name not in header]
        if lacking:
            raise BadTable(f"has no column {lacking[0]}, which its stage writes")
        return {name: kind for name, kind in kinds.items() if kind}

    try:
        table = read_text_table(path, kinds_of)
    except BadTable as error:
        raise UserError(f"{path} {error}; delete it and run: {made_by}") from None
    for name in table.columns.intersection(["Id", "other_Id"]):
        check_ids(table[name], path)
    return table


def preprocess_command(work: Path, store: str | None = None) -> str:
    """Return the last command of stage 01, if need be with the size of a folder of stored images that it has to fill."""
    samples = work / "samples.csv"
    record = read_sidecar(samples) if sidecar(samples).is_file() else {"outputs": {}}
    arguments = record.get("arguments", [])
    if store is not None and f"images/{store}.csv" not in record["outputs"]:
        settings, fields = store_settings(store), ("size_rule", "size_divisor", "image_size", "crop_size")
        kept = [argument for argument in arguments if argument.partition("=")[0] not in fields]
        arguments = [
            argument for argument, after in pairwise([*kept, "--"]) if argument != "--set" or not after.startswith("--")
        ]
        arguments += ["--set", *settings]
    return command("01_preprocess.py", *arguments, "--work", work)


def stored_images(work: Path, store: str, ids: Collection[str]) -> pd.DataFrame:
    """Return stage 01's statistics of the given Ids in one folder of stored images, in their order."""
    rerun = preprocess_command(work, store)
    table = read_table(work / "images" / f"{store}.csv", rerun).set_index("Id")
    missing = [Id for Id in ids if Id not in table.index]
    if missing:
        raise UserError(f"{work / 'images' / store} lacks {len(missing)} samples, such as {missing[0]}; run: {rerun}")
    return table.loc[list(ids)].reset_index()


def images_digest(work: Path, store: str, ids: Collection[str]) -> str:
    """Return the fingerprint of the given Ids' stored images by the columns that all versions write: others change nothing."""
    return digest(stored_images(work, store, ids).filter(regex=r"^(Id|side|crc|(mean|std|zeros|saturated)_\w+)$"))


# --- Ids ---------------------------------------------------------------------------------------------------

SAFE_ID = re.compile(r"\w[\w .+()-]*(?<![ .])")
RESERVED = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE
)  # names of devices, on shares that Windows sees


def check_ids(ids: Iterable[str], path: Path) -> None:
    """Refuse Ids that are not plain file names: an Id becomes part of a path, and must not lead out of its folder."""
    unsafe = [Id for Id in ids if not SAFE_ID.fullmatch(Id) or RESERVED.fullmatch(Id) or len(Id.encode()) > 200]
    if unsafe:
        raise UserError(f"{path} has Ids that are not plain file names:\n{listing(map(repr, unsafe))}")


# --- predictions -------------------------------------------------------------------------------------------


def check_probabilities(ids: ArrayLike, probs: ArrayLike, name: object) -> np.ndarray:
    """Return probabilities within [0, 1], into which what is outside by rounding is moved.

    Raises UserError for repeated Ids, a wrong shape, NaN and values outside by more.
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
            f"such as:\n{listing(found)}"
        )
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{name}: these Ids appear more than once:\n{listing(values[counts > 1])}")
    return np.clip(probs, 0, 1)


def prediction_file(work: Path, recipe_name: str, part: str, fold: int | None = None) -> Path:
    """Return where stage 05 writes the probabilities of a part (oof, test, held_out): one fold's, or all together."""
    return work / "predictions" / recipe_name / (f"{part}.npz" if fold is None else f"fold{fold}_{part}.npz")


def save_predictions(path: Path, ids: ArrayLike, probs: ArrayLike) -> None:
    """Write `ids (n,)`, `probs (n, 28) float32` in [0, 1] and `classes (28,)` as one .npz."""
    ids, probs = np.asarray(ids, dtype=str), np.asarray(probs, dtype=np.float32)
    probs = check_probabilities(ids, probs, path)
    with writing(path) as temporary:
        np.savez(temporary, ids=ids, probs=probs, classes=np.array(CLASS_NAMES))


def load_predictions(path: Path, made_by: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return `ids (n,)` and `probs (n, 28)` of a file written by `save_predictions`, checked again.

    made_by : the command that makes it; None where the file comes from elsewhere
    """
    cure = f"run: {made_by}" if made_by else "expected what stage 05 writes, or a .csv file with Id and 28 columns"
    if not Path(path).is_file():
        raise UserError(f"{path} is missing; {cure}")
    try:
        arrays = read_arrays(path)
        ids, probs, classes = arrays["ids"], arrays["probs"], arrays["classes"].tolist()
        if ids.ndim != 1 or ids.dtype.kind != "U" or probs.dtype.kind != "f":
            raise ValueError(f"ids {ids.shape} of {ids.dtype}, probs {probs.shape} of {probs.dtype}")
        ids = np.array([composed(Id) for Id in ids.tolist()], dtype=str)  # raises where it holds what is no text
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a predictions file ({error}); {cure}") from None
    if classes != list(CLASS_NAMES):
        raise UserError(f"{path} was made for other classes; {cure}")
    return ids, check_probabilities(ids, probs, path)


# --- fingerprints and sidecars -----------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's content, so that a rewritten equal file changes nothing downstream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value, or of a table's CSV text."""
    text = value.to_csv(index=False) if isinstance(value, pd.DataFrame) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sidecar(path: Path) -> Path:
    return Path(path).with_name(Path(path).name + ".meta.json")


def read_sidecar(path: Path) -> dict:
    """Read an artifact's sidecar; raises UserError for what no stage wrote."""
    path = sidecar(path)
    meta = read_json(path)
    meta = (
        {"files": {}, **meta} if isinstance(meta, dict) else {}
    )  # sidecars of earlier versions do not say where inputs lie
    fine = all(isinstance(meta.get(key), dict) for key in ("parameters", "inputs", "outputs", "files"))
    if not (fine and all(map(is_plain_path, meta["outputs"])) and all(map(is_path, meta["files"].values()))):
        raise UserError(f"{path} is not a record that a stage wrote; delete it and run its stage again")
    return meta


def is_path(name: object) -> bool:
    return isinstance(name, str) and "\0" not in name


def is_plain_path(name: str) -> bool:
    return is_path(name) and not os.path.isabs(name)


class Stage:
    """What a stage is about to make, from what: tells whether it is there already, and seals it when done.

    artifact : Path of the main output, which carries the sidecar
    parameters : JSON-able dict
    inputs : dict of name -> Path (fingerprinted here) or str (a digest)
    whole : what one process at a time makes, where that is more than the artifact: the folder of a training
    complete : function that returns the parameters of another version's sidecar as this version would have written them
    """

    def __init__(
        self,
        name: str,
        artifact: Path,
        parameters: dict,
        inputs: dict,
        whole: Path | None = None,
        complete: Callable[[dict], dict] = dict,
    ) -> None:
        self.name = name
        self.complete = complete
        self.artifact = Path(artifact)
        self.whole = whole or self.artifact
        self.held: Lock | None = None
        self.sidecar = sidecar(self.artifact)
        self.parameters = json.loads(json.dumps(parameters))
        self.files = {key: value for key, value in inputs.items() if isinstance(value, Path)}
        self.inputs = {key: fingerprint(value) if isinstance(value, Path) else value for key, value in inputs.items()}
        self.started = time.time()

    def check_unchanged(self, inputs: dict) -> None:
        """Refuse inputs that are others now than when this stage began; call it when they have been read."""
        now = Stage(self.name, self.artifact, self.parameters, {**self.inputs, **inputs})
        if changes := now.changes(self.made_from()):
            raise UserError(
                f"{self.name}: another process wrote its inputs anew since this command began ({changes}); run it again"
            )

    def made_from(self) -> dict:
        return {"parameters": self.parameters, "inputs": self.inputs}

    def changes(self, before: dict) -> str | None:
        """Describe how parameters and inputs differ from an earlier `made_from`; None where they do not.

        A parameter that only one of them has makes no difference while it is off (false, 0 or empty): a newer version added it.
        """
        now, old = self.parameters, self.complete(before.get("parameters", {}))
        changed = [
            key
            for key in sorted({**old, **now})
            if (old[key] != now[key] if key in old and key in now else old.get(key) or now.get(key))
        ]
        if changed:
            return "; ".join(f"{key} was {old.get(key, 'absent')}, now {now.get(key, 'absent')}" for key in changed)
        now, old = self.inputs, before.get("inputs", {})
        changed = [key for key in sorted({**old, **now}) if old.get(key) != now.get(key)]
        return f"changed: {', '.join(changed)}" if changed else None

    def why_stale(self) -> str | None:
        """Return None when the outputs are up to date, else the reason why they are not."""
        if not self.sidecar.is_file():
            return "not made yet"
        meta = read_sidecar(self.artifact)
        changes = self.changes(meta)
        if changes:
            return changes
        for name, content in meta["outputs"].items():
            path = self.sidecar.parent / name
            if not path.is_file() or fingerprint(path) != content:
                return f"{name} is not the file that {self.name} wrote"
        return None

    def is_current(self, rebuilds: bool = True) -> bool:
        """Print one line that says 'up to date', or (for stages that rebuild) why the stage runs again."""
        reason = self.why_stale()
        if reason is None:
            print(f"{self.name}: {self.artifact} is up to date")
        elif rebuilds and reason != "not made yet":
            print(f"{self.name}: making {self.artifact} again ({reason})")
        return reason is None

    def lock(self, wait: bool = False) -> Lock:
        """Return the right to make this, for a `with`; another process that has it is a UserError, or waited for."""
        return Lock(self.whole, wait)

    def begin(self, wait: bool = False) -> None:
        """Lock out others until `finish`, and take the old sidecar away before the first output is touched: from here on
        it is unfinished."""
        self.held = self.lock(wait)
        self.sidecar.unlink(missing_ok=True)

    def finish(self, rows: int, also: Iterable[Path] = (), **more: object) -> None:
        """Write the sidecar: the artifact and what belongs to it (`also`) are in place."""
        outputs = {os.path.relpath(path, self.sidecar.parent): fingerprint(path) for path in (self.artifact, *also)}
        write_json(
            self.sidecar,
            {
                "stage": self.name,
                **self.made_from(),
                "outputs": outputs,
                "files": {key: self.way_to(path) for key, path in self.files.items()},
                "rows": rows,
                "seconds": round(time.time() - self.started, 1),
                **more,
            },
        )
        if self.held:
            self.held.release()

    def way_to(self, path: Path) -> str:
        """Return an input's path from the sidecar's folder, so that a folder that is moved as a whole still finds it."""
        return os.path.relpath(path.parent.resolve() / path.name, self.sidecar.parent.resolve())
