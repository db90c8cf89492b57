"""From planes to 4-plane TIFFs: resize, store and read them back.

Planes are always in the order red (microtubules), green (protein), blue (nucleus), yellow (reticulum).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import cv2
import imagecodecs
import numpy as np
import tifffile

from common.artifacts.files import writing
from common.artifacts.layout import Layout
from common.data import tiff
from common.data.options import WHOLE, Levels
from common.data.samples import Sample
from common.data.sources import CHANNELS, MAX_SIDE, BadImage, examine_sample
from common.errors import UserError, first_line
from common.recipes import stored_size

T = TypeVar("T")

PLAIN_SIDE = 256  # pixels: images up to this side are stored uncompressed, and read four to six times as fast
# Of zstd: with a predictor, 3 % more bytes than deflate at its default level, on images that never were JPEGs.
LEVEL = 6


def resize(plane: np.ndarray, size: int | tuple[int, int], levels: Levels = WHOLE) -> np.ndarray:
    """Bring one channel to (size, size); 16 bit becomes 8 bit as round(255 * (value - black) / (white - black)).

    size : in pixels, of the side; or (height, width), in the proportions of the plane

    It is shrunk by area averaging and enlarged by linear interpolation, at the source's depth, so 16-bit data is
    rounded once. Values below black become 0, above white 255.
    """
    shape = (size, size) if isinstance(size, int) else size
    if plane.shape != shape:
        method = cv2.INTER_AREA if plane.shape[0] > shape[0] else cv2.INTER_LINEAR
        plane = cv2.resize(plane, shape[::-1], interpolation=method)
    if plane.dtype == np.uint8:
        return plane
    values, span = plane.astype(np.uint32).clip(*levels) - levels.black, levels.white - levels.black
    return ((values * 510 + span) // (2 * span)).astype(np.uint8)


def write_planes(path: Path, planes: np.ndarray, raw: bool = False) -> None:
    """Store (4, size, size) uint8 planes as a TIFF that Fiji and napari open as 4 channels; zstd compresses large ones.

    raw : leave large images uncompressed too
    """
    squeeze = {}
    if planes.shape[1] > PLAIN_SIDE and not raw:
        squeeze = {
            "compression": "zstd",
            "compressionargs": {"level": LEVEL},
            "predictor": is_smooth(planes),
            "rowsperstrip": planes.shape[1],
            "maxworkers": 1,
        }  # zstd is slow on many short strips
    with writing(path) as temporary:
        tifffile.imwrite(
            temporary, planes, photometric="minisblack", metadata={"axes": "CYX", "channels": CHANNELS}, **squeeze
        )


def is_smooth(planes: np.ndarray) -> bool:
    """Tell whether a predictor is worth its time in decoding, as for images that were JPEGs.

    That is if, in rows in the middle of each plane, differences between neighbours take a tenth less space than pixels.
    """
    middle = planes[:, planes.shape[1] // 2 :][:, :96].copy()
    differences: np.ndarray = np.diff(middle, axis=-1, prepend=np.uint8(0))
    # The stubs of imagecodecs do not allow arrays.
    packed = imagecodecs.zstd_encode(differences, 1)  # type: ignore[arg-type]
    plain = imagecodecs.zstd_encode(middle, 1)  # type: ignore[arg-type]
    return len(packed) < 0.9 * len(plain)


def corner(share: float, size: int, side: int) -> int:
    """Return where a window of `size` pixels begins: at `share`, in [0, 1), of the possible places along a side."""
    return int(share * (side - size + 1))


def read_planes(
    path: Path, crc: str | None = None, window: tuple[int, float, float] | None = None, lent: bool = False
) -> np.ndarray:
    """Read the (4, size, size) uint8 planes that `write_planes` of this or an earlier version stored.

    crc : their `checksum`; other pixels are refused
    window : side in pixels of a square to read, and its place down and to the right (see `corner`)
    lent : return memory that the thread's next such call overwrites, which saves time
    Raises UserError for a missing or damaged file.
    """
    new = tiff.PIXELS.empty if lent else np.empty
    try:
        data = tiff.read_bytes(path)
        layout = tiff.read_layout(data, len(CHANNELS), MAX_SIDE)
        size, down, right = window or (layout.side, 0, 0)
        top, left = corner(down, size, layout.side), corner(right, size, layout.side)
        planes = tiff.decode(data, layout, new)
        if crc and checksum(planes) != crc:
            raise ValueError("its pixels are not those that were stored")
    except Exception as error:  # decoders raise many kinds; each means a missing or damaged file
        rerun = Layout(path.parents[2]).preprocess_command(path.parent.name)
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} is missing; run: {rerun}") from None
        raise UserError(f"{path} cannot be read ({first_line(error)}); delete it, and run: {rerun}") from None
    return planes[:, top : top + size, left : left + size]


def checksum(planes: np.ndarray) -> str:
    """Return the CRC-32 of all pixels as eight hexadecimal digits."""
    return f"{tiff.crc32(np.ascontiguousarray(planes)):08x}"


def statistics(planes: np.ndarray) -> dict:
    """Return per channel mean, deviation (0 to 1), shares of black and saturated pixels; and the pixels' CRC-32."""
    values = {}
    for channel, plane in zip(CHANNELS, planes, strict=True):
        mean, std = cv2.meanStdDev(plane)
        values[f"mean_{channel}"], values[f"std_{channel}"] = mean.item() / 255, std.item() / 255
        values[f"zeros_{channel}"] = 1 - cv2.countNonZero(plane) / plane.size
        white = cv2.compare(plane, 255, cv2.CMP_EQ)  # type: ignore[call-overload]  # the stubs do not allow numbers
        values[f"saturated_{channel}"] = cv2.countNonZero(white) / plane.size
    return {**values, "crc": checksum(planes)}


@dataclass(frozen=True)
class Storing:
    """How images are stored: in which folder, between which levels, and whether large ones stay uncompressed."""

    folder: Path
    levels: Levels = WHOLE
    raw: bool = False


def store_sample(sample: Sample, how: Storing) -> Sample:
    """Read a sample once and write it to each store where it is missing (see `recipes.stored_size`). Raises BadImage.

    Returns the sample with the statistics of these images, and the exposure of its files.
    """
    cv2.setNumThreads(1)
    channels, exposed = examine_sample(sample.files, sample.rgb_coded)
    made = {}
    for store in sample.lacking:
        size = stored_size(store, len(channels[0]))
        planes = np.stack([resize(channel, size, how.levels) for channel in channels])
        write_planes(how.folder / store / f"{sample.Id}.tif", planes, how.raw)
        made[store] = {"side": size, **statistics(planes)}
    raw = [store for store in sample.raw if store not in made] + (list(made) if how.raw else [])
    return replace(sample, images=sample.images | made, exposure=exposed, raw=tuple(raw), lacking=())


def attempt(function: Callable[..., T], *arguments: object) -> T | BadImage:
    """Call `function`; a BadImage comes back as a value, so that one bad file does not end a parallel run."""
    try:
        return function(*arguments)
    except BadImage as error:
        return error
