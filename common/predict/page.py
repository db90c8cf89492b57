"""The page of new images: a table to sort and filter, how often each class is predicted, a map, and heat maps."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

from common.artifacts.arrays import read_arrays
from common.artifacts.files import write_text
from common.artifacts.stage import Stage, digest
from common.classes import CLASS_NAMES
from common.data.images import attempt
from common.data.labels import parse_targets
from common.data.options import Levels
from common.data.pictures import composite, jpeg
from common.data.sources import BadImage
from common.errors import UserError, nearest
from common.predict.answers import Planned
from common.predict.describe import describe_images, describe_model
from common.predict.inputs import NewImage, read_image
from common.predict.model import Model
from common.predict.reference import with_reference
from common.predict.windows import scaled_planes
from common.process.parallel import run_parallel
from common.report import plots
from common.report.page import Card, Facts, Figure, Gallery, Note, Picture, Table, data_uri, render, section, share

SHOWN = 1000  # images in the table at most: a thumbnail takes about 5 kB
THUMBNAIL = 128  # pixels of a thumbnail's longer side
ON_MAP = 3000  # images on the map at most
COLOURED = 8  # classes with a colour of their own on the map: the most frequent ones
FEWEST = 15  # images and training samples that a map by UMAP needs
ORIGIN = "Everything here comes from the predicted images and the files beside this page."


@dataclass(frozen=True)
class Answers:
    """What the page shows.

    table : predictions.csv; arrays : predictions.npz; embeddings : (n, width) of the first network
    thumbnails : data URIs of the first SHOWN images, '' where an image could not be read
    explained : Ids for heat maps
    """

    planned: Planned
    model: Model
    table: pd.DataFrame
    arrays: dict[str, np.ndarray]
    embeddings: np.ndarray
    thumbnails: list[str]
    explained: list[str]


def make_page(planned: Planned, explained: list[str]) -> None:
    """Write predictions.html, unless it is up to date; explained : Ids of images for heat maps."""
    out, files = planned.out, ("predictions.csv", "predictions.npz", "embeddings.npz")
    inputs = {name: out / name for name in files} | {"model": planned.model.digest}
    inputs["images"] = digest([image.state for image in planned.images])
    stage = Stage("10_predict", out / "predictions.html", {"heat_maps": explained}, inputs)
    if stage.is_current():
        return stage.say_current()
    answers = collect(planned, explained)
    sections = [overview(answers), images(answers), embedding_map(answers)]
    sections += [heat_maps(answers)] if explained else []
    with stage.making() as record:
        write_text(
            stage.artifact, render("New images", f"Predicted by the model {planned.model.name}.", sections, ORIGIN)
        )
        record.rows = len(answers.table)
    size = stage.artifact.stat().st_size / 1e6
    print(f"10_predict: {size:.1f} MB, open it in a browser: {stage.artifact}")


def collect(planned: Planned, explained: list[str]) -> Answers:
    """Read the outputs, and make thumbnails; raises UserError for unknown Ids."""
    from common.train.hardware import HardwareOptions  # loads torch

    table = pd.read_csv(
        planned.out / "predictions.csv", dtype={"Id": str}, keep_default_na=False, na_values={"unlike": ""}
    )
    known = set(table["Id"])
    for Id in explained:
        if Id not in known:
            raise UserError(f"--heat-maps: there is no image {Id!r}; {nearest(Id, known)}")
    model, _ = with_reference(planned.model, planned.out, HardwareOptions())
    arrays, embeddings = read_arrays(planned.out / "predictions.npz"), read_first(planned.out / "embeddings.npz", model)
    by_id = {image.Id: image for image in planned.images}
    some = [by_id[Id] for Id in table["Id"][:SHOWN]]
    return Answers(planned, model, table, arrays, embeddings, thumbnails(some, planned.options.levels), explained)


def read_first(path: Path, model: Model) -> np.ndarray:
    """Return the embeddings of the first network, (n, width), from disk as they are needed."""
    with np.load(path, allow_pickle=False) as file:  # our own file, as large as it needs to be
        return file[model.members[0].label]


def thumbnails(some: Sequence[NewImage], levels: Levels) -> list[str]:
    """Return small pictures of images as data URIs; '' for an image that cannot be read any more."""
    jobs = [(thumbnail, image, levels) for image in some]
    made = [""] * len(some)
    for k, result in run_parallel(attempt, jobs, joblib.cpu_count() if len(jobs) > 32 else 1, "thumbnails", "images"):
        made[k] = "" if isinstance(result, BadImage) else result
    return made


def thumbnail(image: NewImage, levels: Levels, side: int = THUMBNAIL) -> str:
    """Return one image in the atlas's colours as a data URI, at most `side` pixels; missing channels are black."""
    factor = min(1, side / max(image.height, image.width))
    shape = max(1, round(image.height * factor)), max(1, round(image.width * factor))
    return data_uri(jpeg(composite(scaled_planes(read_image(image)[0], shape, levels))))


# --- sections ----------------------------------------------------------------------------------------------


@section("Overview", "What was predicted, by which networks, and what to be careful about.")
def overview(answers: Answers) -> list:
    table, predicted = answers.table, answers.arrays["predicted"]
    flagged = int((table["flags"] != "").sum())
    facts = {"images": f"{len(table):,}", "classes per image": f"{predicted.sum() / max(1, len(table)):.2f}"}
    facts["images with a flag"] = f"{flagged:,}"
    if answers.model.scores and "interval" in answers.model.scores:
        facts["macro F1 of the model"] = f"{answers.model.scores['score_cross_fitted']:.3f}"
    counts = predicted.sum(axis=0)
    classes = pd.DataFrame(
        {
            "class": CLASS_NAMES,
            "images": counts,
            "share": counts / max(1, len(table)),
            "threshold": answers.arrays["thresholds"],
            **of_training(answers.model),
        }
    ).sort_values("images", ascending=False, kind="stable")
    text = "How often each class is predicted, beside its share of the training samples and its F1 there, cross-fitted."
    notes = describe_model(answers.model) + describe_images(answers.planned.images, answers.model)
    return [
        Facts(facts),
        *map(Note, notes),
        Table("Classes", classes, text, {"share": ".1%", "share in training": ".1%"}),
    ]


def of_training(model: Model) -> dict[str, list]:
    """Return each class's share of the training samples and its F1, by column; {} if the model has no scores."""
    scores = model.scores or {}
    if "per_class" not in scores:
        return {}
    rows, n = scores["per_class"], scores["n_samples"]
    found = {"share in training": [row["positives"] / n for row in rows]}
    return found | {"F1": [row["f1_cross_fitted"] for row in rows]} if "f1_cross_fitted" in rows[0] else found


@section("Images", "Every image with its answer. Click a column to sort by it; type to filter, for example a class.")
def images(answers: Answers) -> list:
    table, probs = answers.table[:SHOWN], answers.arrays["probs"]
    order = np.argsort(-probs[:SHOWN], axis=1, kind="stable")[:, :3]
    top = ["; ".join(f"{CLASS_NAMES[c]} {share(probs[k, c])}" for c in some) for k, some in enumerate(order)]
    frame = pd.DataFrame(
        {
            "image": [
                Picture(uri, f"composite of {Id}") if uri else "no longer readable"
                for uri, Id in zip(answers.thumbnails, table["Id"], strict=True)
            ],
            "Id": table["Id"],
            "predicted": table["predicted"].replace("", "none"),
            "most probable": top,
            "flags": table["flags"],
            "agreement": table["agreement"],
            "spread": table["spread"],
            "unlike": table["unlike"].astype(float),
        }
    )
    text = (
        "Agreement: share of single networks and views that alone give the same answer. Spread: the largest standard "
        "deviation of a probability among them. Unlike: distance from the training data, above 1 if farther than 95 in "
        "100 of samples like them."
    )
    if len(answers.table) > SHOWN:
        text += f" The first {SHOWN:,} of {len(answers.table):,} images; predictions.csv has all."
    return [
        Table("Answers", frame, text, {"agreement": ".2f", "spread": ".2f", "unlike": ".2f"}, wide=True, filtered=True)
    ]


@section("Map", "Images that a network sees in a similar way are close to each other.")
def embedding_map(answers: Answers) -> list:
    if len(answers.table) < 3:
        return [Note("A map needs at least three images.")]
    rows = np.unique(np.linspace(0, len(answers.table) - 1, min(ON_MAP, len(answers.table))).round().astype(int))
    known = answers.model.reference.get(answers.model.members[0].label)
    behind = known.embeddings if known else np.empty((0, answers.embeddings.shape[1]))
    points, how = flat(np.concatenate([answers.embeddings[rows], behind]))
    named, kinds = kinds_of(answers.arrays["predicted"][rows], answers.arrays["probs"][rows])
    labels = [*(CLASS_NAMES[c] for c in named), "others"]
    old = [kind_among(target, named) for target in parse_targets(list(known.targets))] if known else []
    text = f"By {how}, from what enters the last layer of {answers.model.members[0].label}. Colours: the most probable "
    text += f"predicted class, of the {len(named)} most frequent ones."
    if known:
        text += (
            " Small and pale: training samples, by label, that this network was not trained on. New images far from "
        )
        text += "all of these are unlike the training data."
    figure = plots.scatter("map", points[: len(rows)], kinds, labels, points[len(rows) :], old)
    return [Figure("Map of the embeddings", figure, text, wide=True)]


def kinds_of(predicted: np.ndarray, probs: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the classes that get a colour, and each image's place among them (the number of them for others)."""
    first = np.where(predicted.any(axis=1), np.where(predicted, probs, -1).argmax(axis=1), -1)
    named = [int(c) for c, _ in Counter(first[first >= 0].tolist()).most_common(COLOURED)]
    return named, [named.index(c) if c in named else len(named) for c in first.tolist()]


def kind_among(target: np.ndarray, named: Sequence[int]) -> int:
    """Return the place of a sample's first label that has a colour, or the number of colours."""
    return next((k for k, c in enumerate(named) if target[c]), len(named))


def flat(embeddings: np.ndarray) -> tuple[np.ndarray, str]:
    """Return places on a plane, (n, 2), and how they were found: UMAP if it is installed, else principal components."""
    rows = embeddings / np.maximum(1e-12, np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True))
    try:
        if len(rows) < FEWEST:
            raise ImportError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its single process, which the fixed seed asks for
            import umap

            places = umap.UMAP(n_neighbors=min(15, len(rows) - 1), metric="cosine", random_state=0).fit_transform(rows)
        return np.asarray(places, np.float64), "UMAP"
    except ImportError:
        centred = rows - rows.mean(axis=0)
        _, _, directions = np.linalg.svd(centred, full_matrices=False)
        places = centred @ directions[:2].T
        why = "too few images for UMAP" if len(rows) < FEWEST else "pip install umap-learn gives a clearer map by UMAP"
        return np.pad(places, ((0, 0), (0, max(0, 2 - places.shape[1])))), f"principal components ({why})"


@section("Heat maps", "Where the networks find evidence for a class (Grad-CAM).")
def heat_maps(answers: Answers) -> list:
    from common.predict.heat import cards_of  # loads torch and captum

    by_id = {image.Id: image for image in answers.planned.images}
    blocks: list = []
    for Id in answers.explained:
        row = int(np.flatnonzero(answers.table["Id"] == Id)[0])
        predicted, probs = answers.arrays["predicted"][row], answers.arrays["probs"][row]
        classes = [c for c in np.argsort(-probs, kind="stable") if predicted[c]] or [int(probs.argmax())]
        cards: list[Card] = cards_of(answers.model, by_id[Id], classes, answers.planned)
        text = (
            f"By the networks of {answers.model.names[0]}, means over the 8 symmetries of the image. Of a field of "
            "several windows, the one in which the class is most probable. Yellow marks most evidence; each map is "
            "scaled to its own maximum."
        )
        blocks.append(Gallery(Id, cards, text, large=True))
    return blocks
