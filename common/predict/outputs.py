"""What somebody with new images gets: a table, arrays with all numbers, and what to be careful about."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.files import writing
from common.artifacts.tables import write_csv
from common.classes import CLASS_NAMES
from common.data import exposure
from common.data.options import Levels
from common.predict.inputs import NewImage
from common.predict.model import Model
from common.predict.reference import outside, unlikeness
from common.predict.run import read_part
from common.score.calibration import calibrated

UNLIKE = "unlike the training data"
DOUBTFUL = 0.5  # share of single networks and views that should predict the same classes
EXPOSED = {"narrow": "few grey levels", "cut off": "cut off at the white level"}


@dataclass
class Results:
    """The answers for n images, in order.

    members : (n_members, n, 28) probabilities of each network, means over views
    probs, calibrated : (n, 28) of the model; calibrated is None if it has no calibration
    predicted : (n, 28) bool
    spread : (n, 28) standard deviation of probabilities over networks and views
    agreement : (n,) share of networks and views that alone predict the same classes
    unlike : (n,) distance from the training data, above 1 if unlike; None if there is no reference
    flags : (n,) what to be careful about, '' if nothing
    windows : (n,) how many cover each image; exposed : see `inputs.read_image`
    """

    images: list[NewImage]
    members: np.ndarray
    probs: np.ndarray
    calibrated: np.ndarray | None
    predicted: np.ndarray
    spread: np.ndarray
    agreement: np.ndarray
    unlike: np.ndarray | None
    flags: list[str]
    windows: np.ndarray
    exposed: list[dict]

    @property
    def ids(self) -> list[str]:
        return [image.Id for image in self.images]

    def names(self, row: int) -> str:
        """Return the predicted classes of an image, the most probable first."""
        order = np.argsort(-self.probs[row], kind="stable")
        return "; ".join(CLASS_NAMES[c] for c in order if self.predicted[row, c])


PARTS = ("members", "spread", "agreement", "means", "exposed", "windows")  # of a finished batch, by image


def gather(
    images: Sequence[NewImage], places: Mapping[str, tuple[Path, int]], model: Model, levels: Levels, embeddings: Path
) -> Results:
    """Collect the results of all images from finished batches, and write their embeddings.

    places : Id -> file and row of its results
    """
    rows_of: dict[Path, list[tuple[int, int]]] = {}
    for place, image in enumerate(images):
        path, row = places[image.Id]
        rows_of.setdefault(path, []).append((place, row))
    found: dict[str, np.ndarray] = {}
    with EmbeddingFile(embeddings, [member.label for member in model.members], len(images)) as file:
        for path, pairs in rows_of.items():
            to, rows = (list(side) for side in zip(*pairs, strict=True))
            part = read_part(path)
            part["members"] = part["members"].swapaxes(0, 1)  # by image, as all others are
            own = [part[f"embedding_{k}"][rows] for k in range(len(model.members))]
            file.write(to, own)
            values = {name: part[name][rows] for name in PARTS}
            if (unlike := unlikeness(own, model)) is not None:
                values["unlike"] = unlike
            for name, some in values.items():
                put(found, name, len(images), to, some)
        file.finish([image.Id for image in images])
    return results_of(list(images), found, model, levels)


def put(arrays: dict[str, np.ndarray], name: str, n: int, rows: list[int], values: np.ndarray) -> None:
    """Put values in some rows of the array `name`, which has n rows; texts may be of any length."""
    if name not in arrays:
        arrays[name] = np.empty((n, *values.shape[1:]), object if values.dtype.kind == "U" else values.dtype)
    arrays[name][rows] = values


def results_of(images: list[NewImage], found: Mapping[str, np.ndarray], model: Model, levels: Levels) -> Results:
    """Return the answers from the arrays PARTS, and unlike if there is a reference, each with a row per image."""
    members = np.ascontiguousarray(found["members"].swapaxes(0, 1))
    probs, exposed = model.combined(members), [json.loads(text) for text in found["exposed"]]
    return Results(
        images=images,
        members=members,
        probs=probs,
        calibrated=None if model.calibration is None else calibrated(probs, model.calibration),
        predicted=model.decide(probs),
        spread=found["spread"],
        agreement=found["agreement"],
        unlike=found.get("unlike"),
        flags=flags_of(images, exposed, levels, outside(found["means"], model), found.get("unlike")),
        windows=found["windows"],
        exposed=exposed,
    )


def flags_of(
    images: Sequence[NewImage], exposed: Sequence[dict], levels: Levels, tones: Sequence[str], unlike: np.ndarray | None
) -> list[str]:
    """Return for each image, in words, what to be careful about; '' if nothing."""
    texts = []
    for k, (image, seen, tone) in enumerate(zip(images, exposed, tones, strict=True)):
        ranges = np.array(seen["ranges"])
        judged = exposure.judge_ranges(ranges, levels) if len(ranges) else None
        found = [
            UNLIKE if unlike is not None and unlike[k] > 1 else "",
            f"{' and '.join(image.missing)} missing" if image.missing else "",
            EXPOSED[judged["kind"]] if judged else "",
            tone,
            "colour images with their signal in other planes" if seen["misplaced"] else "",
        ]
        texts.append("; ".join(text for text in found if text))
    return texts


class EmbeddingFile:
    """embeddings.npz, whose arrays are filled batch by batch on disk: they may be larger than memory.

    ids (n,), and for each network, named by its run and fold, (n, width) float32.
    """

    def __init__(self, path: Path, labels: Sequence[str], n: int) -> None:
        self.path, self.labels, self.n = path, labels, n
        self.arrays: list[np.memmap] = []
        self.temporary = [path.with_name(f".{path.stem}.{k}.npy") for k in range(len(labels))]

    def __enter__(self) -> "EmbeddingFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.arrays = []
        for path in self.temporary:
            path.unlink(missing_ok=True)

    def write(self, rows: list[int], embeddings: Sequence[np.ndarray]) -> None:
        """Put the embeddings of some images, (len(rows), width) of each network, in their rows."""
        if not self.arrays:
            self.arrays = [
                np.lib.format.open_memmap(path, "w+", np.float32, (self.n, part.shape[1]))
                for path, part in zip(self.temporary, embeddings, strict=True)
            ]
        for array, part in zip(self.arrays, embeddings, strict=True):
            array[rows] = part

    def finish(self, ids: Sequence[str]) -> None:
        """Write the file."""
        for array in self.arrays:
            array.flush()
        with writing(self.path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            with archive.open("ids.npy", "w") as file:
                np.lib.format.write_array(file, np.array(ids, dtype=str))
            for label, path in zip(self.labels, self.temporary, strict=True):
                archive.write(path, f"{label}.npy")


def write_arrays(path: Path, results: Results, model: Model) -> None:
    """Write predictions.npz: what stages 06 and 07 read (ids, probs, classes), and all other numbers.

    ids (n,), probs (n, 28), classes (28,); predicted (n, 28); calibrated (n, 28) if there is a calibration; thresholds
    (28,); networks (n_members,), members (n_members, n, 28); spread (n, 28), agreement (n,), unlike (n,)
    """
    arrays = {
        "ids": np.array(results.ids, dtype=str),
        "probs": results.probs,
        "classes": np.array(CLASS_NAMES),
        "predicted": results.predicted,
        "thresholds": model.cuts,
        "networks": np.array([member.label for member in model.members]),
        "members": results.members,
        "spread": results.spread,
        "agreement": results.agreement,
    }
    optional = {"calibrated": results.calibrated, "unlike": results.unlike}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    with writing(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]  # the stubs see a flag among the names


def table(results: Results, model: Model) -> pd.DataFrame:
    """Return predictions.csv: a row per image; see docs/new_images.md for its columns."""
    frame = pd.DataFrame(
        {
            "Id": results.ids,
            "predicted": [results.names(k) for k in range(len(results.images))],
            "flags": results.flags,
            "agreement": results.agreement.round(4),
            "spread": results.spread.max(axis=1).round(4),
            "unlike": np.nan if results.unlike is None else results.unlike.round(4),
            "missing": [" ".join(image.missing) for image in results.images],
            "width": [image.width for image in results.images],
            "height": [image.height for image in results.images],
            "pixel_size": [image.pixel_size for image in results.images],
            "windows": results.windows,
        }
    )
    parts = [frame, pd.DataFrame(results.probs, columns=list(model.classes)).round(7)]
    if results.calibrated is not None:
        names = [f"calibrated {name}" for name in model.classes]
        parts.append(pd.DataFrame(results.calibrated, columns=names).round(7))
    return pd.concat(parts, axis=1)


def write_outputs(folder: Path, results: Results, model: Model) -> None:
    """Write predictions.csv and predictions.npz."""
    write_csv(folder / "predictions.csv", table(results, model))
    write_arrays(folder / "predictions.npz", results, model)
