"""Planes in, 4-plane TIFFs out: resizing, storing and reading back what is stored.

Planes are always in the order red (microtubules), green (protein), blue (nucleus), yellow (reticulum).
"""

import zlib
from pathlib import Path

import cv2
import numpy as np
import tifffile

from common.errors import UserError, first_line
from common.exposure import WHOLE, Levels
from common.files import writing
from common.recipes import stored_size
from common.sources import CHANNELS, MAX_SIDE, BadImage, examine_sample

PLAIN_SIDE = 256  # pixels: images up to this side are stored uncompressed, which reads four to six times as fast


def resize(plane: np.ndarray, size: int, levels: Levels = WHOLE) -> np.ndarray:
    """Shrink one channel to (size, size) by area averaging; 16 bit becomes 8 bit as round(255 * (value - black) / (white - black)).

    Averaging happens in the source's depth, so 16-bit data is rounded once; what is below black becomes 0, above white 255.
    Raises ValueError for enlarging.
    """
    if plane.shape[0] < size:
        raise ValueError(f"would enlarge {plane.shape[0]} px to {size} px")
    if plane.shape[0] > size:
        plane = cv2.resize(plane, (size, size), interpolation=cv2.INTER_AREA)
    if plane.dtype == np.uint8:
        return plane
    values, span = plane.astype(np.uint32).clip(*levels) - levels.black, levels.white - levels.black
    return ((values * 510 + span) // (2 * span)).astype(np.uint8)


def write_planes(path: Path, planes: np.ndarray) -> None:
    """Store (4, size, size) uint8 planes as a TIFF, large ones with deflate, that Fiji and napari open as 4 channels."""
    with writing(path) as temporary:
        squeeze = {"compression": "zlib", "predictor": True} if planes.shape[1] > PLAIN_SIDE else {}
        tifffile.imwrite(temporary, planes, photometric="minisblack", metadata={"axes": "CYX", "channels": CHANNELS}, **squeeze)


def read_planes(path: Path, crc: str | None = None) -> np.ndarray:
    """Read the (4, size, size) uint8 planes that `write_planes` stored; raises UserError where it cannot.

    crc : what `checksum` was of them; other pixels are refused
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            if max(tiff.pages.first.shape) > MAX_SIDE:
                raise ValueError(f"claims {tiff.pages.first.shape} px")
            planes = tiff.asarray(maxworkers=1)
        if planes.ndim != 3 or len(planes) != len(CHANNELS):
            raise ValueError(f"has the shape {planes.shape}, expected {len(CHANNELS)} planes")
        if crc and checksum(planes) != crc:
            raise ValueError("its pixels are not those that were stored")
    except Exception as error:  # decoders raise many kinds; each means a missing or damaged file
        raise UserError(f"{path} cannot be read ({first_line(error)}); delete it, and run: python 01_preprocess.py") from None
    return planes


def checksum(planes: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(planes)):08x}"


def statistics(planes: np.ndarray) -> dict:
    """Return per-channel mean and standard deviation on the 0-1 scale, shares of black and saturated pixels, and a
    CRC-32 of the pixels."""
    values = {}
    for channel, plane in zip(CHANNELS, planes, strict=True):
        mean, std = cv2.meanStdDev(plane)
        values[f"mean_{channel}"], values[f"std_{channel}"] = mean.item() / 255, std.item() / 255
        values[f"zeros_{channel}"] = 1 - cv2.countNonZero(plane) / plane.size
        values[f"saturated_{channel}"] = cv2.countNonZero(cv2.compare(plane, 255, cv2.CMP_EQ)) / plane.size
    return {**values, "crc": checksum(planes)}


def store_sample(Id: str, files: list[Path], rgb_coded: bool, stores: list[str], folder: Path,
                 levels: Levels = WHOLE) -> tuple[dict[str, dict], dict]:
    """Read a sample once and write it to each store (see `recipes.stored_size`) in `folder`. Raises BadImage.

    Returns store -> statistics, and how its files are exposed (see `exposure.judge`).
    """
    cv2.setNumThreads(1)
    channels, exposed = examine_sample(files, rgb_coded)
    made = {}
    for store in stores:
        size = stored_size(store, len(channels[0]))
        planes = np.stack([resize(channel, size, levels) for channel in channels])
        write_planes(folder / store / f"{Id}.tif", planes)
        made[store] = {"side": size, **statistics(planes)}
    return made, exposed


def attempt(function, *arguments):
    """Call `function`; a BadImage comes back as a value, so that one bad file does not end a parallel run."""
    try:
        return function(*arguments)
    except BadImage as error:
        return error
