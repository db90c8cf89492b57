"""What 10_predict.py prints: about the model, the images, the answers, and what to be careful about."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.classes import CLASS_NAMES
from common.data import exposure
from common.data.options import Levels
from common.errors import listing
from common.predict.inputs import NewImage
from common.predict.model import SIDE, Model
from common.predict.options import FILLED, KEPT, PRICES
from common.predict.outputs import DOUBTFUL, UNLIKE, Results


def describe_model(model: Model) -> list[str]:
    """Describe a model: its networks, what they score, and what the user should know."""
    folds: dict[str, list[int]] = {}
    for member in model.members:
        folds.setdefault(member.name, []).append(member.fold)
    whose = ", ".join(
        f"{name} fold{'s' * (len(numbers) > 1)} {','.join(map(str, numbers))}" for name, numbers in folds.items()
    )
    lines = [f"{model.source}: {len(model.members)} network{'s' * (len(model.members) > 1)} ({whose})"]
    if model.scores and "interval" in model.scores:
        low, high = model.scores["interval"]
        lines.append(
            f"macro F1 {model.scores['score_cross_fitted']:.3f} [{low:.3f}, {high:.3f}] on {model.scores['n_samples']} "
            "samples like those that it was trained on; new images may differ from these"
        )
    return lines + [f"warning: {text}" for text in model.warnings]


def describe_images(images: Sequence[NewImage], model: Model) -> list[str]:
    """Describe the images that can be used: how many, how they are scaled, and which channels are missing."""
    sizes = Counter((image.width, image.height) for image in images)
    listed = ", ".join(f"{n} of {width} x {height} px" for (width, height), n in sizes.most_common(4))
    lines = [f"{len(images)} images: {listed}{', ...' * (len(sizes) > 4)}"]
    return lines + describe_scale(images, model) + describe_missing(images)


def describe_scale(images: Sequence[NewImage], model: Model) -> list[str]:
    """Describe how images are brought to the scale of the training images."""
    lines = []
    sides = sorted({member.side for member in model.members})
    known = [image for image in images if image.pixel_size]
    if known:
        sizes = sorted({round(image.pixel_size or 0, 4) for image in known})
        shown = f"{sizes[0]:g}" if len(sizes) == 1 else f"{sizes[0]:g} to {sizes[-1]:g}"
        target = ", ".join(f"{model.pixel_size * SIDE / side:.3g}" for side in sides)
        lines.append(
            f"{len(known)} with pixels of {shown} micrometres, brought to {target} and covered by windows of "
            f"{', '.join(map(str, sides))} px"
        )
        coarse = [image for image in known if (image.pixel_size or 0) > 1.5 * model.pixel_size * SIDE / sides[-1]]
        if coarse:
            lines.append(
                f"warning: {len(coarse)} are coarser than the training images, which show details that these cannot"
            )
    unknown = [image for image in images if not image.pixel_size]
    if unknown:
        oblong = sum(image.width != image.height for image in unknown)
        lines.append(
            f"{len(unknown)} do not say how large their pixels are, so each is taken for a whole training image"
            + (
                f"; the {oblong} that are not square are covered by square windows of their short side"
                if oblong
                else ""
            )
            + "; for another magnification give --pixel-size"
        )
    return lines


def describe_missing(images: Sequence[NewImage]) -> list[str]:
    """Warn of missing channels, with the way they are filled and what that costs."""
    counts = Counter(channel for image in images for channel in image.missing)
    words = {c: "the mean of the training images" if how == "mean" else f"a {how}" for c, how in FILLED.items()}
    return [
        f"warning: {n} images have no {channel} channel; it is filled with {words[channel]}. On the demo data that "
        f"costs {PRICES[channel]:.2f} of macro F1 0.75; {KEPT[channel]:.0%} of 50 real images kept their labels"
        for channel, n in counts.items()
    ]


def describe_results(folder: Path, results: Results, model: Model, levels: Levels) -> list[str]:
    """Describe the answers: how often each class is predicted, and which images to look at."""
    n = len(results.images)
    counts = results.predicted.sum(axis=0)
    order = [c for c in np.argsort(-counts, kind="stable") if counts[c]]
    lines = [
        f"{folder / 'predictions.csv'}: {n} images, {results.predicted.sum() / max(1, n):.2f} classes per image",
        ", ".join(f"{CLASS_NAMES[c]} {counts[c]}" for c in order) or "no classes",
    ]
    if results.calibrated is None:
        lines.append("the model has no calibration, so there are no calibrated probabilities (see docs/new_images.md)")
    doubtful = [Id for Id, share in zip(results.ids, results.agreement, strict=True) if share < DOUBTFUL]
    if doubtful:
        lines.append(
            f"{len(doubtful)} doubtful: most networks and views alone predict other classes:\n{listing(doubtful, 3)}"
        )
    unlike = [Id for Id, text in zip(results.ids, results.flags, strict=True) if UNLIKE in text]
    if unlike:
        lines.append(
            f"warning: {len(unlike)} of {n} images are unlike the training data (up to 1 in 20 is expected), so their "
            f"answers may be wrong however sure they look:\n{listing(unlike, 3)}"
        )
    judged = exposure.judge(["new"] * n, results.exposed, levels)
    return lines + [f"warning: {line}" for line in exposure.describe(judged, "10_predict.py")]
