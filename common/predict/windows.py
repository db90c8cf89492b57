"""From a field of any shape and magnification to square windows as the network knows them.

A field whose pixel size is known is brought to the pixel size of the training images. Otherwise its short side is taken
for a whole training image. The field is then covered by windows of the network's size, evenly placed, with the least
overlap. A field that is smaller is mirrored at its borders, which keeps more of macro F1 than black borders or none.
"""

from itertools import product

import numpy as np

from common.data.images import resize
from common.data.options import Levels
from common.data.sources import MAX_SIDE, BadImage
from common.predict.inputs import NewImage, Planes

SMALLEST = 32  # pixels of a window's side, as of training crops


def scaled_shape(image: NewImage, side: int, pixel_size: float) -> tuple[int, int]:
    """Return (height, width) of a field for a network, in pixels.

    side : of the network's images; pixel_size : of these in micrometres
    Raises BadImage for fields that would be too small or too large.
    """
    short = min(image.height, image.width)
    factor = image.pixel_size / pixel_size if image.pixel_size else side / short
    height, width = round(image.height * factor), round(image.width * factor)
    if max(height, width) > MAX_SIDE or min(height, width) < SMALLEST:
        why = f"with pixels of {image.pixel_size:g} micrometres " if image.pixel_size else ""
        raise BadImage(
            f"has {image.width} x {image.height} px, which {why}become {width} x {height} px for the network; expected "
            f"{SMALLEST} to {MAX_SIDE}: check --pixel-size"
        )
    return height, width


def starts(length: int, side: int) -> list[int]:
    """Return where windows of `side` pixels begin along a length: evenly, as few as cover it, [0] if it is shorter."""
    n = -(-length // side)
    return [round(k * (length - side) / (n - 1)) for k in range(n)] if n > 1 else [0]


def count_windows(shape: tuple[int, int], side: int) -> int:
    """Return how many windows cover a field of (height, width) pixels."""
    return len(starts(shape[0], side)) * len(starts(shape[1], side))


def scaled_planes(planes: Planes, shape: tuple[int, int], levels: Levels) -> np.ndarray:
    """Return a field's planes as (4, height, width) uint8; missing ones are 0, and filled in later.

    Values of 16 bit between the levels become 0 to 255, as in stage 01.
    """
    result = np.zeros((len(planes), *shape), np.uint8)
    for plane, target in zip(planes, result, strict=True):
        if plane is not None:
            target[:] = resize(plane, shape, levels)
    return result


def cover(field: np.ndarray, side: int) -> list[np.ndarray]:
    """Return windows (4, side, side) that cover a field (4, height, width), as views; a small field is mirrored."""
    borders = [(space // 2, space - space // 2) for space in (max(0, side - length) for length in field.shape[1:])]
    field = np.pad(field, [(0, 0), *borders], mode="reflect")
    places = product(starts(field.shape[1], side), starts(field.shape[2], side))
    return [field[:, top : top + side, left : left + side] for top, left in places]
