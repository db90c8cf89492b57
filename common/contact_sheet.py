"""Pairs of images side by side, with their distances, for a person to judge."""

from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts import writing
from common.hashing import HASHED
from common.images import read_planes

SHOWN = 12  # pairs of each kind


def composite(planes: np.ndarray) -> np.ndarray:
    """Return (4, h, w) uint8 planes in the atlas's colours as (h, w, 3) uint8: yellow adds to red and green, bright enough to see."""
    red, green, blue, yellow = planes.astype(np.float32)
    picture = np.stack([red + yellow / 2, green + yellow / 2, blue], axis=-1)
    return np.clip(picture * (255 / max(1.0, np.percentile(picture, 99.5))), 0, 255).astype(np.uint8)


def save_contact_sheet(path: Path, folder: Path, sections: dict[str, pd.DataFrame]) -> None:
    """Draw the first pairs of each section, (title -> table of pairs), side by side.

    folder : where the stored images are
    """
    from matplotlib.figure import Figure

    sections = {title: pairs.head(SHOWN) for title, pairs in sections.items() if len(pairs)}
    rows = sum(-(-len(pairs) // 3) for pairs in sections.values())
    figure = Figure(figsize=(15, 2.9 * max(1, rows) + 0.6 * len(sections) + 0.4), layout="constrained")
    if not sections:
        figure.text(0.5, 0.5, "no pairs within the distance or near it", ha="center")
    heights = [-(-len(pairs) // 3) for pairs in sections.values()]
    for part, (title, pairs) in zip(np.atleast_1d(figure.subfigures(max(1, len(sections)), 1, height_ratios=heights or [1])),
                                    sections.items(), strict=False):
        part.suptitle(title, fontsize=13)
        for axes, pair in zip(part.subplots(-(-len(pairs) // 3), 3, squeeze=False).flat, pairs.itertuples(), strict=False):
            both = [composite(read_planes(folder / f"{Id}.tif")) for Id in (pair.Id, pair.other_Id)]
            gap = np.full((len(both[0]), 4, 3), 255, np.uint8)
            axes.imshow(np.hstack([both[0], gap, both[1]]))
            bits = ", ".join(f"{channel} {getattr(pair, channel)}" for channel in HASHED)
            labels = f"labels {pair.Target or '?'} | {pair.other_Target or '?'}"
            axes.set_title(f"{pair.Id[:24]} ({pair.part}) | {pair.other_Id[:24]} ({pair.other_part})\n{bits} bits; {labels}", fontsize=8)
        for axes in part.axes:
            axes.axis("off")
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
