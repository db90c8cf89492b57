"""A fast reader of the stored TIFFs. tifffile writes these files, but its reader takes much longer to decode them."""

import math
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import DTypeLike

WIDTH, LENGTH, COMPRESSION, OFFSETS, ROWS, COUNTS, PREDICTOR = 256, 257, 259, 273, 278, 279, 317
UNCOMPRESSED, DEFLATE, ZSTD, DIFFERENCES = 1, 8, 50000, 2
UNPACK: dict[int, Callable[..., Any]] = {DEFLATE: imagecodecs.deflate_decode, ZSTD: imagecodecs.zstd_decode}
KINDS = {3: "H", 4: "I"}  # of the tags that are read: 16 and 32 bit numbers


@dataclass(frozen=True)
class Layout:
    """How a TIFF stores (n_planes, side, side) uint8 pixels.

    rows : per strip; the last strip of a plane may have fewer
    strips : (offset, bytes) of each strip of each plane
    """

    side: int
    compression: int
    predictor: int
    rows: int
    strips: list[list[tuple[int, int]]]

    def lengths(self) -> list[int]:
        """Return the number of rows of each strip of a plane."""
        return [min(self.rows, self.side - top) for top in range(0, self.side, self.rows)]


def read_layout(data: np.ndarray, n_planes: int, max_side: int) -> Layout:
    """Read the layout of a file that tifffile wrote with a page per plane; raises errors for other or damaged files."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4].tobytes())
    if order is None:
        raise ValueError("is not a TIFF")
    pages = read_tags(data, n_planes, order)

    def numbers(page: dict, tag: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        if tag not in page and default is not None:
            return default
        kind, count, value = page[tag]
        form = struct.Struct(f"{order}{count}{KINDS[kind]}")
        return (
            form.unpack(value[: form.size])
            if form.size <= 4
            else form.unpack_from(data.data, *struct.unpack(order + "I", value))
        )

    first = pages[0]
    (width,), (side,), (compression,), (rows,) = (numbers(first, tag) for tag in (WIDTH, LENGTH, COMPRESSION, ROWS))
    if width != side or not 0 < side <= max_side or not 0 < rows <= side:
        raise ValueError(f"claims {width} x {side} px in strips of {rows} rows")
    (predictor,) = numbers(first, PREDICTOR, (1,))
    return Layout(
        side,
        compression,
        predictor,
        rows,
        [list(zip(numbers(page, OFFSETS), numbers(page, COUNTS), strict=True)) for page in pages],
    )


def read_tags(data: np.ndarray, n_pages: int, order: str) -> list[dict[int, tuple[int, int, bytes]]]:
    """Return tag -> (kind, count, value or its offset) of each page; order : of bytes, < or >."""
    place, pages = 4, []
    for _ in range(n_pages):
        (start,) = struct.unpack_from(order + "I", data.data, place)
        (entries,) = struct.unpack_from(order + "H", data.data, start)
        place = start + 2 + 12 * entries
        tags = struct.iter_unpack(order + "HHI4s", data[start + 2 : place].data)
        pages.append({tag: (kind, count, value) for tag, kind, count, value in tags})
    return pages


class Memory(threading.local):
    """A reused array per thread: new memory for each image, with its page faults, would slow down decoding a lot."""

    def __init__(self) -> None:
        self.bytes: np.ndarray = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> np.ndarray:
        """Return an array like np.empty's, which the thread's next call overwrites."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self.bytes.size < size:
            self.bytes = np.empty(size, np.uint8)
        return self.bytes[:size].view(dtype).reshape(shape)


FILE, PIXELS = Memory(), Memory()


def crc32(data: np.ndarray) -> int:
    """Return the same CRC-32 as zlib.crc32, many times faster."""
    return imagecodecs.deflate_crc32(data)  # type: ignore[arg-type]  # the stubs do not allow arrays


def read_bytes(path: Path) -> np.ndarray:
    """Return a file's bytes, until the thread reads the next one."""
    with open(path, "rb", buffering=0) as file:
        data = FILE.empty((os.fstat(file.fileno()).st_size,))
        return data[: file.readinto(data.data)]


def decode(
    data: np.ndarray, layout: Layout, new: Callable[[tuple[int, ...], DTypeLike], np.ndarray] = np.empty
) -> np.ndarray:
    """Return the planes as (n_planes, side, side) uint8 pixels.

    new : function that makes the array: np.empty, or a Memory's
    """
    side, heights = layout.side, layout.lengths()
    planes = new((len(layout.strips), side, side), np.uint8)
    for plane, strips in zip(planes, layout.strips, strict=True):
        bottoms = accumulate(heights, initial=0)
        for (offset, count), (top, bottom) in zip(strips, pairwise(bottoms), strict=True):
            decode_strip(data[offset : offset + count], layout, plane[top:bottom])
    return planes


def decode_strip(packed: np.ndarray, layout: Layout, pixels: np.ndarray) -> None:
    """Decode one strip into `pixels`, (rows, side)."""
    if layout.compression == UNCOMPRESSED:
        pixels[:] = packed.reshape(pixels.shape)
        return
    unpack = UNPACK.get(layout.compression)
    if unpack is None:
        raise ValueError(f"is compressed as {layout.compression}; expected {UNCOMPRESSED} or one of {list(UNPACK)}")
    if len(unpack(packed, out=pixels.reshape(-1))) != pixels.size:
        raise ValueError("has a strip that is too short")
    if layout.predictor == DIFFERENCES:
        imagecodecs.delta_decode(pixels, axis=-1, out=pixels)
