"""The page of one sample: channels, probabilities against thresholds, duplicates, heat maps."""

from difflib import get_close_matches

import numpy as np
import pandas as pd

from common.data.folds import HOLD_OUT, TRAIN_ONLY
from common.data.images import CHANNELS
from common.data.labels import parse_targets
from common.data.pictures import composite, jpeg
from common.errors import UserError
from common.report import plots
from common.report.inputs import STAINS, pair_card
from common.report.page import Card, Facts, Figure, Gallery, Note, Table, data_uri, render, section, share
from common.report.reader import NAMES, Work, class_names, there
from common.score.ensemble import combine

SIDE = 384  # pixels of a large image at most
EMPTY = "empty: no evidence in the image"


def sample_page(work: Work, Id: str, recipe: str | None = None) -> str:
    """Return the page of a sample as HTML; raises UserError for an Id that is not in samples.csv.

    recipe : whose networks the heat maps show; None for the first one of the ensemble
    """
    if Id not in work.targets_by_id:  # Ids of artifacts are plain file names
        raise UserError(why_unknown(work, Id))
    sections = [image(work, Id), probabilities(work, Id), duplicates(work, Id), heat(work, Id, recipe)]
    return render(f"Sample {Id}", f"From the work folder {work.folder.resolve().name}.", sections)


def why_unknown(work: Work, Id: str) -> str:
    """Explain why there is no such sample: stage 01 left it out, or the Id is misspelt."""
    lost = dict(work.left_out[["Id", "reason"]].to_numpy())
    if Id in lost:
        return f"stage 01 left out the sample {Id}: {lost[Id]}"
    known = list(work.targets_by_id)
    near = [one for one in known if Id and one.startswith(Id.lower())] or get_close_matches(Id, [*known, *lost], 1)
    return f"there is no sample {Id!r} in {work.folder / 'samples.csv'} ({len(known):,} samples); " + (
        f"did you mean {near[0]}?" if near else f"one of them is {known[0]}"
    )


@section("Image", "The four channels, and the composite in the atlas's colours.")
def image(work: Work, Id: str) -> list:
    sample = work.samples[work.samples["Id"] == Id].iloc[0]
    facts = {"labels": class_names(sample["Target"]), "part": sample["part"], "source": f"{sample['side']} px"}
    planes = there(lambda: work.planes(Id, SIDE))
    if planes is None:
        return [Facts(facts), Note("Its image is no longer stored.")]
    cards = [
        Card([(data_uri(jpeg(composite(planes))), f"composite of sample {Id}")], ["composite", "all four channels"])
    ]
    for channel, plane in zip(CHANNELS, planes, strict=True):
        cards.append(
            Card([(data_uri(jpeg(stretched(plane))), f"{channel} channel of sample {Id}")], [channel, STAINS[channel]])
        )
    return [
        Facts(facts),
        Gallery(
            "Channels",
            cards,
            "Each is stretched to the whole range separately, so brightness cannot be compared between channels.",
            large=True,
        ),
    ]


def stretched(plane: np.ndarray) -> np.ndarray:
    return np.clip(plane * (255 / max(1.0, np.percentile(plane, 99.5))), 0, 255).astype(np.uint8)


def place(work: Work, Id: str) -> tuple[int | None, str]:
    """Return the fold whose network was not trained on a sample, and in words the sample's place in the split.

    The fold is None if all folds' networks, or none, were trained on it.
    """
    if part_of(work, Id) == "test":
        return None, "a test sample, which no network was trained on"
    folds = there(lambda: work.folds)
    if folds is None:
        return None, "not split yet"
    same = folds.loc[folds["group"] == work.duplicates.set_index("Id")["group"].get(Id), "fold"]
    if same.empty:
        raise UserError(
            f"folds.csv does not have this sample; run: {work.layout.command('02_dedup.py')}, then 03_make_folds.py"
        )
    fold = int(same.iloc[0])
    if fold == HOLD_OUT:
        return None, "held out, so that no network was trained on it"
    if fold == TRAIN_ONLY:
        return None, "for training only, so that every network was trained on it"
    if Id not in set(folds["Id"]):
        return fold, f"left out as a duplicate of samples in fold {fold}, which this network was not trained on"
    return fold, f"in fold {fold}, which this network was not trained on"


def part_of(work: Work, Id: str) -> str:
    return work.samples.set_index("Id")["part"][Id]


# --- probabilities -----------------------------------------------------------------------------------------


def member_probabilities(work: Work, Id: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return recipe -> probabilities (28,) of a sample, and their combination as stage 06 makes it.

    Raises UserError if the sample is not predicted.
    """
    if work.given:
        raise UserError(
            f"the thresholds are for predictions given to stage 06 ({', '.join(work.members)}), not for stage 05's; "
            f"run: {work.layout.command('06_thresholds.py')}"
        )
    parts = ["test"] if part_of(work, Id) == "test" else ["oof", "held_out"]
    for part in parts:
        if part != "held_out" or work.layout.predictions(work.recipes[0], part).is_file():
            ids, stack = work.predictions(part)
            for row in np.flatnonzero(np.asarray(ids) == Id):
                return dict(zip(work.recipes, stack[:, row], strict=True)), combine(stack, *work.how)[row]
    raise UserError(
        f"stage 05 predicts test samples and, out of fold, labelled ones; this sample is neither ({place(work, Id)[1]})"
    )


@section("Probabilities", "A class is predicted if its probability reaches its threshold.")
def probabilities(work: Work, Id: str) -> list:
    members, together = member_probabilities(work, Id)
    known = part_of(work, Id) != "test"
    labelled = parse_targets([work.targets_by_id[Id]])[0]
    predicted = together >= work.cuts
    order = np.argsort(-together, kind="stable")
    state = np.array(["", "predicted", "labelled", "both"])[2 * labelled + predicted]
    table = pd.DataFrame(
        {"class": NAMES, "state": state, "together": together, "threshold": work.cuts, **members}
    ).iloc[order]
    tuned = there(lambda: work.thresholds)
    return [
        Facts(
            {
                "labelled": class_names(work.targets_by_id[Id]),
                "predicted": ", ".join(NAMES[predicted]) or "none",
                **submitted(work, Id),
                work.combined: ", ".join(members),
            }
        ),
        Figure(
            "Probability of each class",
            plots.dots(
                "probabilities",
                [f"{NAMES[c]} (labelled)" if labelled[c] else NAMES[c] for c in order],
                {"threshold": work.cuts[order], "probability": together[order]},
                "probability",
                xlim=(-0.02, 1.02),
            ),
            "Predicted if the filled mark is right of the hollow one. "
            + ("" if tuned else "Stage 06 has not run, so thresholds are 0.5. ")
            + ("A labelled class far left of its threshold is a miss: look for it in the image." if known else ""),
        ),
        Table(
            "Probabilities",
            table,
            ("State: labelled, predicted, or both. " if known else "") + "The prediction uses the "
            f"{work.combined} the members, in the column together.",
            dict.fromkeys(["together", "threshold", *members], share),
        ),
    ]


def submitted(work: Work, Id: str) -> dict[str, str]:
    """Return a test sample's classes in the submission: by default the most probable one if none passes."""
    table = there(lambda: work.submission)
    rows = [] if table is None else list(table.loc[table["Id"] == Id, "Predicted"])
    return {"in the submission": class_names(rows[-1]) if rows[-1] else "none"} if rows else {}


@section("Duplicates", "Samples with nearly the same image.")
def duplicates(work: Work, Id: str) -> list:
    pairs = work.pairs[(work.pairs["Id"] == Id) | (work.pairs["other_Id"] == Id)]
    if pairs.empty:
        return [Note("No other sample is near-identical.")]
    return [
        Gallery(
            "Near-identical samples",
            [pair_card(work, pair) for pair in pairs.head(24).itertuples()],
            f"{len(pairs)} pairs, the closest first. They should have the same labels.",
        )
    ]


# --- heat maps ---------------------------------------------------------------------------------------------


@section("Heat maps", "Where the networks find evidence for a class (Grad-CAM).")
def heat(work: Work, Id: str, recipe: str | None) -> list:
    from common.report.heat_maps import explain  # the only part of the page that needs torch

    recipe = recipe or (there(lambda: work.recipes) or list(work.runs))[0]
    fold, known = place(work, Id)
    finished = [number for number in work.runs.get(recipe, {}) if work.run_record(recipe, number)]
    numbers = [fold] if fold is not None else finished or [0]  # untrained folds are refused below
    whose = f"fold{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    predicted = there(lambda: member_probabilities(work, Id)[1])

    def reasons(own: np.ndarray) -> dict[int, str]:
        return to_explain(work, Id, own if predicted is None else predicted)

    row = pd.DataFrame({"Id": [Id], "Target": [work.targets_by_id[Id]]})
    probs, maps = explain(work.folder, recipe, numbers, work.folds, row, reasons)
    background = work.planes(Id, SIDE)
    cards = [
        Card(
            [(data_uri(jpeg(overlay(background, heat))), f"heat map of {NAMES[c]}")],
            [NAMES[c], why, f"probability {share(probs[c])}", *([] if heat.any() else [EMPTY])],
        )
        for (c, heat), why in zip(maps.items(), reasons(probs).values(), strict=True)
    ]
    which = "Means over the networks of" if len(numbers) > 1 else "The network is that of"
    return [
        Note(
            f"{which} {recipe}, {whose}. This sample is {known}. Maps and probabilities are means over the 8 "
            "symmetries of the image."
        ),
        Gallery(
            "Evidence in the image",
            cards,
            "Yellow marks most evidence for the class, over the image in grey. Each map is "
            "scaled to its own maximum. A cell of the map is several pixels of the image. The yellow should lie on the "
            "structure; if it does not, the networks rely on something else.",
            large=True,
        ),
    ]


def to_explain(work: Work, Id: str, probs: np.ndarray) -> dict[int, str]:
    """Return the classes of a sample to explain, most probable first, with the reason.

    probs : (28,) that are compared with the thresholds
    """
    labelled = parse_targets([work.targets_by_id[Id]])[0]
    why = {
        int(c): " and ".join(
            word for word, holds in (("labelled", labelled[c]), ("predicted", probs[c] >= work.cuts[c])) if holds
        )
        for c in np.argsort(-probs, kind="stable")
    }
    return {c: text for c, text in why.items() if text} or {
        next(iter(why)): "the most probable class, below its threshold"
    }


def overlay(planes: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return a heat map (side, side) in [0, 1] over an image in grey, (h, w, 3) uint8; without heat only grey."""
    import cv2
    from matplotlib import colormaps

    grey = composite(planes).max(axis=2, keepdims=True).astype(float)
    heat = cv2.resize(heat, grey.shape[:2], interpolation=cv2.INTER_LINEAR)
    alpha = 0.8 * heat[..., None]
    return (grey * (1 - alpha) + 255 * colormaps["cividis"](heat)[..., :3] * alpha).round().astype(np.uint8)
