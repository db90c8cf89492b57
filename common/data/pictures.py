"""Images for people to check: in the atlas's colours, small, and as pairs side by side with their distances."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from common.artifacts.files import writing
from common.data.duplicates import HASHED
from common.data.images import read_planes, resize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN, COLUMNS = 12, 3  # pairs of each kind, pairs in a row


def composite(planes: np.ndarray) -> np.ndarray:
    """Return (4, h, w) uint8 planes in the atlas's colours, (h, w, 3) uint8, bright enough to see.

    Yellow adds to red and green.
    """
    red, green, blue, yellow = planes.astype(np.float32)
    picture = np.stack([red + yellow / 2, green + yellow / 2, blue], axis=-1)
    return np.clip(picture * (255 / max(1.0, np.percentile(picture, 99.5))), 0, 255).astype(np.uint8)


def small_planes(path: Path, side: int) -> np.ndarray:
    """Read a stored sample's planes, (4, side, side) uint8, or smaller if stored smaller."""
    planes = read_planes(path)
    return np.stack([resize(plane, min(side, len(plane))) for plane in planes])


def jpeg(picture: np.ndarray, quality: int = 82) -> bytes:
    """Return (h, w) or (h, w, 3) uint8 as JPEG, with colours as sharp as brightness: thin structures are coloured."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()


def save_pair_sheet(path: Path, folder: Path, pairs: pd.DataFrame, doubtful: pd.DataFrame) -> None:
    """Draw duplicates, the closest and the farthest ones, and the pairs that are `doubtful`; see `save_contact_sheet`."""
    nearest = pairs.loc[pairs[list(HASHED)].sum(axis=1).sort_values(kind="stable").index]
    sections = {
        "closest pairs": nearest,
        "farthest pairs that count as duplicates": nearest[::-1],
        "nearest pairs that do not": doubtful,
    }
    save_contact_sheet(path, folder, sections)


def save_contact_sheet(path: Path, folder: Path, sections: dict[str, pd.DataFrame]) -> None:
    """Draw the first pairs of each section, (title -> table of pairs), side by side.

    folder : where the stored images are
    """
    from matplotlib.figure import Figure

    sections = {title: pairs.head(SHOWN) for title, pairs in sections.items() if len(pairs)}
    heights = [-(-len(pairs) // COLUMNS) for pairs in sections.values()] or [1]
    figure = Figure(figsize=(15, 3.1 * sum(heights) + 0.4), layout="constrained")
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if not sections:
        parts[0].suptitle("no pairs within the thresholds or near them")
    for part, height, (title, pairs) in zip(parts, heights, sections.items(), strict=False):
        part.suptitle(title, fontsize=13)
        cells = list(part.subplots(height, COLUMNS, squeeze=False).flat)
        for axes in cells:
            axes.axis("off")
        for axes, pair in zip(cells, pairs.itertuples(), strict=False):
            draw_pair(axes, pair, folder)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def draw_pair(axes: "Axes", pair: Any, folder: Path) -> None:
    """Draw one pair with its Ids, distances and labels."""
    left, right = (composite(read_planes(folder / f"{Id}.tif")) for Id in (pair.Id, pair.other_Id))
    axes.imshow(np.hstack([left, np.full((len(left), 4, 3), 255, np.uint8), right]))
    bits = ", ".join(f"{channel} {getattr(pair, channel)}" for channel in HASHED)
    axes.set_title(
        f"{pair.Id[:24]} ({pair.part}) | {pair.other_Id[:24]} ({pair.other_part})\n"
        f"{bits} bits; labels {pair.Target or '?'} | {pair.other_Target or '?'}",
        fontsize=8,
    )
