"""The stored TIFFs from within: each strip has a CRC-32 of its own, so that a crop decodes only the strips it touches.

tifffile writes these files. It reads them too, but its own work and memory add much to the time of decoding.
"""

import math
import os
import struct
import threading
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import imagecodecs
import numpy as np

WIDTH, LENGTH, COMPRESSION, OFFSETS, ROWS, COUNTS, PREDICTOR = 256, 257, 259, 273, 278, 279, 317
CRCS = 65001  # a tag of those for private use: the CRC-32 of each strip's pixels, plane by plane
UNCOMPRESSED, DEFLATE, DIFFERENCES = 1, 8, 2
KINDS = {3: "H", 4: "I"}  # the types of the tags that are read: 16 and 32 bit numbers


@dataclass(frozen=True)
class Layout:
    """How a TIFF holds (n_planes, side, side) uint8 pixels.

    rows : of a strip; the last one of a plane may have fewer
    strips : (offset, bytes) of each strip of each plane
    crcs : CRC-32 of each strip, plane by plane; empty in files that have no such tag
    """
    side: int
    compression: int
    predictor: int
    rows: int
    strips: list[list[tuple[int, int]]]
    crcs: tuple[int, ...]

    def lengths(self) -> list[int]:
        """Return the number of rows of each strip of a plane."""
        return [min(self.rows, self.side - top) for top in range(0, self.side, self.rows)]


def read_layout(data: np.ndarray, n_planes: int, max_side: int) -> Layout:
    """Read the layout of a file's bytes, which tifffile wrote with a page a plane; raises for what is none or claims too much."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4].tobytes())
    if order is None:
        raise ValueError("is no TIFF")
    place, pages = 4, []
    for _ in range(n_planes):
        start, = struct.unpack_from(order + "I", data, place)
        entries, = struct.unpack_from(order + "H", data, start)
        place = start + 2 + 12 * entries
        pages.append({tag: (kind, count, value) for tag, kind, count, value in
                      struct.iter_unpack(order + "HHI4s", data[start + 2:place])})

    def numbers(page: dict, tag: int, default=None) -> tuple[int, ...]:
        if tag not in page and default is not None:
            return default
        kind, count, value = page[tag]
        form = struct.Struct(f"{order}{count}{KINDS[kind]}")
        return form.unpack(value[:form.size]) if form.size <= 4 else form.unpack_from(data, *struct.unpack(order + "I", value))

    first = pages[0]
    (width,), (side,), (compression,), (rows,) = (numbers(first, tag) for tag in (WIDTH, LENGTH, COMPRESSION, ROWS))
    if width != side or not 0 < side <= max_side or not 0 < rows <= side:
        raise ValueError(f"claims {width} x {side} px in strips of {rows} rows")
    return Layout(side, compression, *numbers(first, PREDICTOR, (1,)), rows,
                  [list(zip(numbers(page, OFFSETS), numbers(page, COUNTS), strict=True)) for page in pages],
                  numbers(first, CRCS, ()))


class Memory(threading.local):
    """An array for each thread that is used again and again: with the system's page faults, new memory for each image would
    take a good part of the time of decoding it."""

    def __init__(self):
        self.bytes = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype=np.uint8) -> np.ndarray:
        """Return an array like np.empty's, which the thread's next call overwrites."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self.bytes.size < size:
            self.bytes = np.empty(size, np.uint8)
        return self.bytes[:size].view(dtype).reshape(shape)


FILE, PIXELS = Memory(), Memory()


def read_bytes(path) -> np.ndarray:
    """Return a file's bytes, until the thread reads the next one."""
    with open(path, "rb", buffering=0) as file:
        data = FILE.empty((os.fstat(file.fileno()).st_size,))
        return data[:file.readinto(data)]


def decode(data: np.ndarray, layout: Layout, first: int = 0, end: int | None = None, new=np.empty) -> np.ndarray:
    """Return the strips `first` to `end` of each plane as (n_planes, rows, side) uint8 pixels.

    new : what makes the array, np.empty or that of a Memory
    """
    side, heights = layout.side, layout.lengths()[first:end]
    planes = new((len(layout.strips), sum(heights), side), np.uint8)
    for plane, strips in zip(planes, layout.strips, strict=True):
        bottoms = accumulate(heights, initial=0)
        for (offset, count), (top, bottom) in zip(strips[first:end], pairwise(bottoms), strict=True):
            decode_strip(data[offset:offset + count], layout, plane[top:bottom])
    return planes


def decode_strip(packed: np.ndarray, layout: Layout, pixels: np.ndarray) -> None:
    """Decode one strip into `pixels`, (rows, side)."""
    if layout.compression == UNCOMPRESSED:
        pixels[:] = packed.reshape(pixels.shape)
        return
    if layout.compression != DEFLATE:
        raise ValueError(f"is compressed as {layout.compression}; expected {UNCOMPRESSED} or {DEFLATE}")
    if len(imagecodecs.deflate_decode(packed, out=pixels.reshape(-1))) != pixels.size:
        raise ValueError("has a strip that is too short")
    if layout.predictor == DIFFERENCES:
        imagecodecs.delta_decode(pixels, axis=-1, out=pixels)


# --- checksums ---------------------------------------------------------------------------------------------

def crc32(pixels: np.ndarray, value: int = 0) -> int:
    """Return the CRC-32 that zlib.crc32 would, many times as fast; value : that of what comes before."""
    return imagecodecs.deflate_crc32(pixels, value)


def strip_crcs(planes: np.ndarray, rows: int) -> list[int]:
    """Return the CRC-32 of each strip of so many rows, plane by plane."""
    return [crc32(plane[top:top + rows]) for plane in planes for top in range(0, planes.shape[1], rows)]


def are_strips(planes: np.ndarray, layout: Layout, first: int, crc: int) -> bool:
    """Tell whether the pixels from strip `first` on are those that a file notes, and whether all of its CRCs join to `crc`."""
    found, a_plane = strip_crcs(planes, layout.rows), len(layout.lengths())
    here = range(first, first + len(found) // len(planes))
    return found == [layout.crcs[k * a_plane + i] for k in range(len(planes)) for i in here] and joined_crc(layout) == crc


def joined_crc(layout: Layout) -> int:
    """Return the CRC-32 of all pixels, from those of the strips."""
    shares = crc_shares(tuple(rows * layout.side for rows in layout.lengths() * len(layout.strips)))
    bits = np.array(layout.crcs, np.uint32)[:, None] >> np.arange(32, dtype=np.uint32) & 1
    return int(np.bitwise_xor.reduce(shares * bits, axis=None))


@cache
def crc_shares(lengths: tuple[int, ...]) -> np.ndarray:
    """Return (n_parts, 32) uint32: what each bit of a part's CRC-32 adds, by exclusive or, to that of the parts in a row.

    A CRC is linear: bytes that follow change a bit of it as they would change it were they all zero.
    lengths : bytes of each part
    """
    shares = [[1 << bit for bit in range(32)]]
    for length in reversed(lengths[1:]):
        zeros = np.zeros(length, np.uint8)
        nothing = crc32(zeros)
        shares.append([crc32(zeros, value) ^ nothing for value in shares[-1]])
    return np.array(shares[::-1], np.uint32)
