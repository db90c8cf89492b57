"""Channel files in, 4-plane TIFFs out: finding, checking, resizing and storing images.

Planes are always in the order red (microtubules), green (protein), blue (nucleus), yellow (reticulum).
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from common import tiff
from common.errors import UserError, first_line
from common.files import writing
from common.recipes import stored_size

CHANNELS = ("red", "green", "blue", "yellow")
TIFF = (".tif", ".tiff")
SUFFIXES = (*TIFF, ".png", ".jpg", ".jpeg")
PICTURES = ("PNG", "JPEG")  # Pillow would open a hundred others by their content, one of them by starting Ghostscript
WHITE = 65535  # the 16-bit value that becomes 255
PLAIN_SIDE = 256  # pixels: images up to this side are stored uncompressed, which reads four to six times as fast
STRIP = 96  # rows that are compressed together: a crop decodes only the strips it touches, and many short ones decode slowly
LEVEL = 8  # of deflate: 6 would take 6 % more bytes than with a predictor, 8 takes 5 %
MAX_SIDE = 8192  # pixels, twice the largest real ones; a header that claims more is damaged or hostile
TIFF_COMPRESSIONS = ("NONE", "LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "ZSTD")
RGB_PLANES = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1)}


class BadImage(Exception):
    """Say what is wrong with one image file; stages collect these and report them together."""


@dataclass(frozen=True)
class Header:
    """Size in pixels, bit depth and whether the file holds three colour planes."""
    width: int
    height: int
    bits: int
    colour: bool


# --- finding -----------------------------------------------------------------------------------------------

def list_files(folder: Path) -> dict[str, Path]:
    """Map 'Id_colour' to its file for every image in `folder`; TIFF wins over PNG over JPEG."""
    found = {}
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)
                if suffix.lower() in SUFFIXES and entry.is_file():  # no folder, nor a pipe that would be waited for
                    rank = SUFFIXES.index(suffix.lower())
                    if stem not in found or rank < found[stem][0]:
                        found[stem] = (rank, Path(entry.path))
    return {stem: path for stem, (_, path) in found.items()}


def channel_files(Id: str, folders: list[dict[str, Path]]) -> tuple[list[Path], list[str]]:
    """Return a sample's four files from the first folder that has all of them, and what is missing otherwise."""
    wanted = [f"{Id}_{channel}" for channel in CHANNELS]
    for files in folders:
        if all(stem in files for stem in wanted):
            return [files[stem] for stem in wanted], []
    nearest = max(folders, key=lambda files: sum(stem in files for stem in wanted), default={})
    return [], [stem for stem in wanted if stem not in nearest]


# --- reading -----------------------------------------------------------------------------------------------

def read_header(path: Path, rgb_coded: bool = False) -> Header:
    """Read size and type without decoding; raises BadImage for what is not a usable image of one channel.

    rgb_coded : whether a colour image may hold the channel
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            header = tiff_header(path) if path.suffix.lower() in TIFF else picture_header(path)
    except BadImage:
        raise
    except Exception as error:  # decoders raise many kinds; each means an unreadable file
        raise BadImage(f"cannot be read ({first_line(error)})") from None
    if max(header.width, header.height) > MAX_SIDE:
        raise BadImage(f"claims {header.width} x {header.height} px; at most {MAX_SIDE} are accepted")
    if header.width != header.height:
        raise BadImage(f"is not square ({header.width} x {header.height} px)")
    if header.colour and not rgb_coded:
        raise BadImage("is a colour image; expected one grey channel a file")
    return header


def picture_header(path: Path) -> Header:
    with Image.open(path, formats=PICTURES) as image:
        return Header(*image.size, bits=16 if image.mode.startswith("I") else 8,
                      colour=image.mode not in ("L", "I;16", "I;16B", "I"))


def tiff_header(path: Path) -> Header:
    with tifffile.TiffFile(path) as tiff:
        if len(tiff.pages) != 1:
            raise BadImage(f"has {len(tiff.pages)} pages; expected one channel a file")
        page = tiff.pages.first
        compression = getattr(page.compression, "name", page.compression)
        if compression not in TIFF_COMPRESSIONS:
            raise BadImage(f"is compressed as {compression}; expected one of {', '.join(TIFF_COMPRESSIONS)}")
        if page.dtype not in (np.uint8, np.uint16):
            raise BadImage(f"holds {page.dtype}; expected 8 or 16 bit unsigned integers")
        if page.photometric.name == "MINISWHITE":
            raise BadImage("is stored inverted (white is zero); expected black is zero")
        if page.samplesperpixel not in (1, 3):
            raise BadImage(f"has {page.samplesperpixel} values a pixel; expected one")
        sides = (page.imagewidth, page.imagelength, page.tilewidth, page.tilelength)
        if max(sides) > MAX_SIDE or page.imagedepth != 1:
            raise BadImage(f"claims {' x '.join(map(str, page.shape))} px; at most {MAX_SIDE} x {MAX_SIDE} are accepted")
        return Header(page.imagewidth, page.imagelength, page.dtype.itemsize * 8,
                      page.samplesperpixel != 1 or page.photometric.name == "PALETTE")


def looks_cut_short(path: Path) -> bool:
    """Tell whether the end of a file is missing, as after a broken download, from its last bytes or a TIFF's table of data."""
    if path.suffix.lower() in TIFF:
        try:
            with tifffile.TiffFile(path) as tiff:
                page = tiff.pages.first
                return max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))) > path.stat().st_size
        except Exception:  # its decoders raise many kinds
            return True
    with open(path, "rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        return (b"IEND" if path.suffix.lower() == ".png" else b"\xff\xd9") not in file.read()


def read_channel(path: Path, channel: str, rgb_coded: bool = False) -> np.ndarray:
    """Decode one channel fully into a (side, side) uint8 or uint16 array.

    rgb_coded : the Human Protein Atlas publishes each channel as a colour JPEG; its planes for `channel` are
        taken (yellow: the mean of R and G), never a grey conversion, which would dim the channels unequally.
    Raises BadImage, also for colour files where grey ones are expected.
    """
    header = read_header(path, rgb_coded)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = tifffile.imread(path) if path.suffix.lower() in TIFF else decode(path)
    except Exception as error:
        raise BadImage(f"cannot be decoded ({first_line(error)})") from None
    if image.shape[:2] != (header.height, header.width):
        raise BadImage(f"decodes to {image.shape}, its header says {header.height} x {header.width}")
    if image.ndim == 3:
        planes = [image[..., plane].astype(np.uint16) for plane in RGB_PLANES[channel]]
        image = ((sum(planes) + len(planes) // 2) // len(planes)).astype(image.dtype)
    return image


def decode(path: Path) -> np.ndarray:
    """Decode a PNG or JPEG; Pillow refuses truncated files, where OpenCV fills up in silence."""
    with Image.open(path, formats=PICTURES) as image:
        if image.mode in ("P", "RGBA", "CMYK", "LA", "YCbCr"):
            image = image.convert("RGB")
        pixels = np.asarray(image)
    return pixels.astype(np.uint16) if pixels.dtype == np.int32 else pixels


def check_sample(files: list[Path], rgb_coded: bool = False) -> int:
    """Return the side of a sample in pixels after reading its four headers; raises BadImage with the file."""
    return one_side(files, [header.width for header in
                            per_channel(lambda path, _: read_header(path, rgb_coded), files)])


def read_sample(files: list[Path], rgb_coded: bool = False) -> list[np.ndarray]:
    """Decode the four channels of a sample and check that they have one size; raises BadImage with the file."""
    planes = per_channel(lambda path, channel: read_channel(path, channel, rgb_coded), files)
    one_side(files, [len(plane) for plane in planes])
    return planes


def per_channel(read, files: list[Path]) -> list:
    """Call `read(path, channel)` for each of a sample's files; a BadImage then names its file."""
    results = []
    for path, channel in zip(files, CHANNELS, strict=True):
        try:
            results.append(read(path, channel))
        except BadImage as error:
            raise BadImage(f"{path} {error}") from None
    return results


def one_side(files: list[Path], sides: list[int]) -> int:
    """Return the common side of a sample's channels in pixels; raises BadImage where they differ."""
    if len(set(sides)) > 1:
        raise BadImage(f"{files[0].parent}: channels of different sizes {sorted(set(sides))} px: "
                       f"{', '.join(path.name for path in files)}")
    return sides[0]


# --- resizing and storing ----------------------------------------------------------------------------------

def resize(plane: np.ndarray, size: int, white: int = WHITE) -> np.ndarray:
    """Bring one channel to (size, size); 16 bit becomes 8 bit as round(255 * value / white).

    It is made smaller by area averaging, larger by linear interpolation.

    Averaging happens in the source's depth, so 16-bit data is rounded once; what is above `white` becomes 255.
    """
    if plane.shape[0] != size:
        plane = cv2.resize(plane, (size, size), interpolation=cv2.INTER_AREA if plane.shape[0] > size else cv2.INTER_LINEAR)
    if plane.dtype == np.uint8:
        return plane
    return np.minimum((plane.astype(np.uint32) * 510 + white) // (2 * white), 255).astype(np.uint8)


def write_planes(path: Path, planes: np.ndarray, raw: bool = False) -> None:
    """Store (4, size, size) uint8 planes as a TIFF that Fiji and napari open as 4 channels, large ones with deflate.

    raw : leave large ones uncompressed too
    """
    squeeze = {}
    if planes.shape[1] > PLAIN_SIDE and not raw:
        crcs = tiff.strip_crcs(planes, STRIP)
        squeeze = {"compression": "zlib", "compressionargs": {"level": LEVEL}, "predictor": is_smooth(planes),
                   "rowsperstrip": STRIP, "maxworkers": 1, "extratags": [(tiff.CRCS, "I", len(crcs), crcs, True)]}
    with writing(path) as temporary:
        tifffile.imwrite(temporary, planes, photometric="minisblack", metadata={"axes": "CYX", "channels": CHANNELS}, **squeeze)


def is_smooth(planes: np.ndarray) -> bool:
    """Tell from a strip in the middle of each plane whether differences between neighbours take a tenth less room than pixels,
    as in images that were JPEGs. Elsewhere a predictor is not worth the third that it adds to the time of decoding."""
    middle = planes[:, planes.shape[1] // 2:][:, :STRIP].copy()
    differences = np.diff(middle, axis=-1, prepend=np.uint8(0))
    return len(imagecodecs.deflate_encode(differences, 1)) < 0.9 * len(imagecodecs.deflate_encode(middle, 1))


def corner(share: float, size: int, side: int) -> int:
    """Return where a window of `size` pixels begins that lies at `share`, in [0, 1), of its way along an image's side."""
    return int(share * (side - size + 1))


def read_planes(path: Path, crc: str | None = None, window: tuple[int, float, float] | None = None,
                lent: bool = False) -> np.ndarray:
    """Read the (4, size, size) uint8 planes that `write_planes` stored, now or in an earlier version; raises UserError where
    it cannot.

    crc : what `checksum` was of them; other pixels are refused
    window : side in pixels of a square to read, and how far down and to the right it lies (see `corner`)
    lent : return memory that the thread's next such call overwrites, which saves time
    """
    new = tiff.PIXELS.empty if lent else np.empty
    try:
        data = tiff.read_bytes(path)
        layout = tiff.read_layout(data, len(CHANNELS), MAX_SIDE)
        size, down, right = window or (layout.side, 0, 0)
        top, left = corner(down, size, layout.side), corner(right, size, layout.side)
        if size < layout.side and layout.crcs:
            first, end = top // layout.rows, -(-(top + size) // layout.rows)
            planes = tiff.decode(data, layout, first, end, new)
            right_pixels = not crc or tiff.are_strips(planes, layout, first, int(crc, 16))
            top -= first * layout.rows
        else:
            planes = tiff.decode(data, layout, new=new)
            right_pixels = not crc or checksum(planes) == crc
        if not right_pixels:
            raise ValueError("its pixels are not those that were stored")
    except Exception as error:  # decoders raise many kinds; each means a missing or damaged file
        raise UserError(f"{path} cannot be read ({first_line(error)}); delete it, and run: python 01_preprocess.py") from None
    return planes[:, top:top + size, left:left + size]


def checksum(planes: np.ndarray) -> str:
    """Return the CRC-32 of all pixels as eight hexadecimal digits."""
    return f"{tiff.crc32(np.ascontiguousarray(planes)):08x}"


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
                 white: int = WHITE, raw: bool = False) -> tuple[dict[str, dict], int | None]:
    """Read a sample once and write it to each store (see `recipes.stored_size`) in `folder`. Raises BadImage.

    Returns store -> statistics, and the largest value of a 16-bit source (None for 8 bit).
    """
    cv2.setNumThreads(1)
    channels = read_sample(files, rgb_coded)
    made = {}
    for store in stores:
        size = stored_size(store, len(channels[0]))
        planes = np.stack([resize(channel, size, white) for channel in channels])
        write_planes(folder / store / f"{Id}.tif", planes, raw)
        made[store] = {"side": size, **statistics(planes)}
    deep = [int(channel.max()) for channel in channels if channel.dtype == np.uint16]
    return made, max(deep, default=None)


def attempt(function, *arguments):
    """Call `function`; a BadImage comes back as a value, so that one bad file does not end a parallel run."""
    try:
        return function(*arguments)
    except BadImage as error:
        return error
