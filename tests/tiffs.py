"""Write TIFFs with any tags, byte by byte, and read them as tifffile's page and Pillow do."""

import struct
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def packed(values: np.ndarray, bits: int, order: str) -> bytes:
    """Pack rows of whole numbers, (height, n), with `bits` bits each; rows begin at whole bytes."""
    if bits == 16:
        return values.astype(f"{order}u2").tobytes()
    digits = (values[..., None].astype(np.uint32) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.astype(np.uint8).reshape(len(values), -1), axis=1).tobytes()


def write_tiff(
    path: Path,
    values: np.ndarray,
    bits=8,
    photometric=1,
    fill_order=1,
    orientation=1,
    planar=1,
    table=None,
    order="<",
    compression=1,
    rows=None,
    description=None,
    subfiles=(0,),
    more=(),
    images=1,
) -> None:
    """Write values, (height, width) or (height, width, n), with these tags.

    table : (n, 3) of 16 bits
    subfiles : NewSubfileType of each page
    more : further entries (tag, type, numbers)
    images : how many times the data is written
    """
    height, width, n = values.shape if values.ndim == 3 else (*values.shape, 1)
    rows = rows or height
    planes = [values.reshape(height, -1)] if planar == 1 or n == 1 else [values[..., k] for k in range(n)]
    strips = [packed(plane[top : top + rows], bits, order) for plane in planes for top in range(0, height, rows)]
    strips = [zlib.compress(strip) if compression == 8 else strip for strip in strips]
    if fill_order == 2:
        strips = [
            np.packbits(np.unpackbits(np.frombuffer(strip, np.uint8)).reshape(-1, 8)[:, ::-1], axis=1).tobytes()
            for strip in strips
        ]
    content, places = bytearray(struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 0)), []
    for strip in strips:
        places.append(len(content))
        content += strip + b"\0" * (len(strip) % 2)
    content += b"".join(strips) * (images - 1)
    entries = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * n),
        259: ("H", [compression]),
        266: ("H", [fill_order]),
        262: ("H", [photometric]),
        273: ("I", places),
        274: ("H", [orientation]),
        277: ("H", [n]),
        278: ("I", [rows]),
        279: ("I", list(map(len, strips))),
        284: ("H", [planar]),
    }
    if table is not None:
        entries[320] = ("H", list(map(int, np.asarray(table).T.ravel())))
    if description is not None:
        entries[270] = ("s", description.encode() + b"\0")
    entries |= {tag: (kind, numbers) for tag, kind, numbers in more}
    link = 4
    for subfile in subfiles:
        struct.pack_into(f"{order}I", content, link, len(content))
        link = add_page(content, order, entries | {254: ("I", [subfile])})
    path.write_bytes(content)


def add_page(content: bytearray, order: str, entries: dict) -> int:
    """Append a page; return where to write the address of the next one."""
    entries = {tag: value for tag, value in entries.items() if value is not None and value[1] is not None}
    start = len(content)
    content += bytes(2 + 12 * len(entries) + 4)
    struct.pack_into(f"{order}H", content, start, len(entries))
    for k, (tag, (kind, numbers)) in enumerate(sorted(entries.items())):
        data = numbers if kind == "s" else struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        struct.pack_into(f"{order}HHI", content, start + 2 + 12 * k, tag, {"s": 2, "H": 3, "I": 4}[kind], len(numbers))
        if len(data) > 4:
            struct.pack_into(f"{order}I", content, start + 10 + 12 * k, len(content))
            content += data + b"\0" * (len(data) % 2)
        else:
            content[start + 10 + 12 * k : start + 10 + 12 * k + len(data)] = data
    return start + 2 + 12 * len(entries)


def stretched(values: np.ndarray, bits: int) -> np.ndarray:
    """Return values of `bits` bits stretched to 8 or 16 bits."""
    kind = np.uint8 if bits <= 8 else np.uint16
    return np.rint(values * (np.iinfo(kind).max / (2**bits - 1))).astype(kind)


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in TURNS:
        return image
    places = np.arange(image.shape[0] * image.shape[1], dtype=np.int32).reshape(image.shape[:2])
    places = np.asarray(Image.fromarray(places).transpose(TURNS[orientation]))
    return image.reshape(-1, *image.shape[2:])[places]


def agreed(path: Path) -> np.ndarray | None:
    """Return what tifffile's page and Pillow agree on, after inversion, orientation and stretching.

    None if they disagree or one of them cannot read the file. For an image with a colour table: its indices.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            bits, inverted, orientation = page.bitspersample, page.photometric == 0, page.tags.valueof(274, 1)
            image = page.asarray(squeeze=False)[:, 0]
            palette = page.photometric == 3
        image = np.concatenate(list(image), axis=-1)
        image = image[..., 0] if image.shape[-1] == 1 else image
        image = image if palette else stretched(image.astype(int), bits)
        image = turned(np.iinfo(image.dtype).max - image if inverted else image, orientation)
        with Image.open(path, formats=("TIFF",)) as picture:
            picture.load()
            other = np.asarray(picture)
            other = (
                stretched(other.astype(int), 1 if picture.mode == "1" else 12)
                if picture.mode == "1" or bits == 12
                else other
            )
            other = 65535 - other if inverted and bits == 16 else other
    except Exception:  # both raise many types
        return None
    return image if image.shape == other.shape and (image == other).all() else None
