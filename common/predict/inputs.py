"""New images: list them in a folder or a table, check them, and read their planes. No labels, no torch."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.stage import digest
from common.artifacts.tables import RESERVED, SAFE_ID, write_csv
from common.artifacts.text_tables import composed, read_text_table
from common.data import exposure, sources, stacks
from common.data.images import attempt
from common.data.labels import read_csv
from common.data.options import WHOLE, Levels
from common.data.sources import CHANNELS, BadImage
from common.errors import UserError, listing
from common.process.parallel import run_parallel

BAD_FILES = "bad_files.csv"  # in the folder of the answers: images that cannot be used, and why
FEW = 100  # images whose headers are read sooner by one process than others start
TABLE = ("Id", *CHANNELS, "file", "missing", "pixel_size")  # columns of a table of images
Planes = list[np.ndarray | None]  # of the four channels, (height, width) uint8 or uint16; None = missing


@dataclass(frozen=True)
class NewImage:
    """One field of view to predict, and what is known about it; `check` adds to it.

    files : of the four channels, None for a missing one; () if all are in `stack`
    order : the number of each channel in the stack, None for a missing one
    missing : names of the channels that it lacks
    pixel_size : in micrometres; None = not known
    height, width : in pixels; 0 before `check`
    state : changes if its files do
    fault : why it cannot be used
    """

    Id: str
    files: tuple[Path | None, ...] = ()
    stack: Path | None = None
    order: tuple[int | None, ...] = ()
    missing: tuple[str, ...] = ()
    pixel_size: float | None = None
    height: int = 0
    width: int = 0
    state: str = ""
    fault: str = ""

    @property
    def paths(self) -> list[Path]:
        return [self.stack] if self.stack else [path for path in self.files if path]


@dataclass(frozen=True)
class InputOptions:
    """How images are read.

    channels : colour -> number or name in files with several channels; None to go by the names
    missing : colours that no image has
    pixel_size : in micrometres, of all images for which their table has none; None to use their metadata
    levels : of 16-bit files
    keep_going : leave out images that cannot be used, instead of an error at the end
    """

    channels: Mapping[str, str] | None = None
    missing: tuple[str, ...] = ()
    pixel_size: float | None = None
    levels: Levels = WHOLE
    keep_going: bool = False


# --- listing -----------------------------------------------------------------------------------------------


def list_images(place: Path, options: InputOptions) -> list[NewImage]:
    """List the images of a folder, or of a CSV file that names their files; what is wrong with one is its fault.

    Raises UserError if there are none.
    """
    if place.exists() and (stacks.stack_suffix(place.name) or sources.suffix_of(place.name)):
        raise UserError(f"--images {place} is a single image; give the folder that holds it, or a CSV file")
    if place.is_dir():
        images = list_folder(place, options)
    elif place.is_file():
        images = list_table(place, options)
    else:
        raise UserError(f"--images {place} is missing; expected a folder of images, or a CSV file that names them")
    if not images:
        raise UserError(
            f"{place} has no images; expected <Id>_red.tif, _green, _blue and _yellow (or .png, .jpg), or one file "
            f"with all channels per sample (<Id>.ome.tif, <Id>.tif, <Id>.ome.zarr){found_instead(place)}"
        )
    return [with_state(image) for image in images]


def found_instead(folder: Path) -> str:
    """Describe the first entries of a folder without images."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return f"; found {', '.join(names[:5])}{' ...' * (len(names) > 5)}" if names else ""


def list_folder(folder: Path, options: InputOptions) -> list[NewImage]:
    """List the images of a folder, sorted by Id: those with a file per channel, and files with all channels."""
    files = sources.list_files(folder)
    single, whole = set(), {}
    for stem, path in files.items():
        Id, _, colour = stem.rpartition("_")
        if Id and colour in CHANNELS:
            single.add(Id)
        else:
            whole[stem] = path
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = stacks.stack_suffix(entry.name)
            if suffix and suffix.endswith("zarr") and entry.is_dir() and not entry.name.startswith("."):
                whole[composed(entry.name[: -len(suffix)])] = Path(entry.path)
    images = [from_channel_files(Id, files, options) for Id in single]
    images += [from_stack(Id, path, options.missing, options.pixel_size) for Id, path in whole.items()]
    twice = single & set(whole)
    return [
        replace(image, fault=f"{image.Id} has both a file per channel and one with all ({whole[image.Id].name})")
        if image.Id in twice
        else image
        for image in sorted(images, key=lambda image: (image.Id, image.stack is None))
    ]


def from_channel_files(Id: str, files: sources.Files, options: InputOptions) -> NewImage:
    """Return an image with a file per channel."""
    wanted = {channel: composed(f"{Id}_{channel}") for channel in CHANNELS if channel not in options.missing}
    lacking = [stem for stem in wanted.values() if stem not in files]
    fault = safe(Id)
    if lacking and not fault:
        cure = [stem.rpartition("_")[2] for stem in lacking]
        fault = sources.not_found(lacking, [files]) + (
            "" if "green" in cure else f" (for images without it give --missing {','.join(cure)})"
        )
    found = tuple(files.get(wanted[channel]) if channel in wanted else None for channel in CHANNELS)
    return NewImage(Id, found, missing=options.missing, pixel_size=options.pixel_size, fault=fault)


def from_stack(Id: str, path: Path, missing: tuple[str, ...], pixel_size: float | None) -> NewImage:
    """Return an image with all channels in one file."""
    fault = safe(Id)
    if not fault and not stacks.stack_suffix(path.name):
        fault = (
            f"{path.name} does not end in a colour; expected {Id}_red, _green, _blue and _yellow, or one TIFF or "
            "OME-Zarr with all channels"
        )
    return NewImage(Id, stack=path, missing=missing, pixel_size=pixel_size, fault=fault)


def safe(Id: str) -> str:
    """Return what is wrong with an Id, which becomes part of file names; '' if nothing is."""
    fine = SAFE_ID.fullmatch(Id) and not RESERVED.fullmatch(Id) and len(Id.encode()) <= 200
    return "" if fine else f"{Id!r} is no plain file name; rename the file"


def list_table(path: Path, options: InputOptions) -> list[NewImage]:
    """List the images of a CSV file: Id, a path per channel or one `file`, and optionally missing and pixel_size.

    Paths are relative to the CSV file's folder. Raises UserError for a table without them.
    """
    table = read_rows(path)
    unknown = [name for name in table.columns if name not in TABLE]
    if "file" not in table and not set(CHANNELS) & set(table.columns):
        raise UserError(
            f"{path} names no images; expected the columns Id,{','.join(CHANNELS)} or Id,file (optionally missing and "
            f"pixel_size), found {', '.join(table.columns)}"
        )
    if unknown:
        print(f"{path}: the columns {', '.join(unknown)} are not used")
    return [from_row(row._asdict(), path.parent, options) for row in table.itertuples(index=False)]


def read_rows(path: Path) -> pd.DataFrame:
    """Read all columns of a CSV file as text, and check its Ids; raises UserError."""
    ids = read_csv(path)["Id"]
    return read_text_table(path).assign(Id=ids)


def from_row(row: Mapping[str, str], folder: Path, options: InputOptions) -> NewImage:
    """Return the image of a table's row."""
    words = row.get("missing", "").replace(",", " ").split()
    missing = tuple(channel for channel in CHANNELS if channel in {*words, *options.missing})
    fault = wrong_colours(words)
    size, text = options.pixel_size, row.get("pixel_size", "")
    if text:
        size = stacks.plausible(stacks.in_micrometres(text, "um"))
        fault = fault or ("" if size else f"{row['Id']}: the pixel size {text!r} is no number of micrometres")
    if row.get("file"):
        path, problem = table_path(folder, row["file"])
        image = from_stack(row["Id"], path, missing, size)
        return replace(image, fault=fault or problem or image.fault)
    files: list[Path | None] = []
    for channel in CHANNELS:
        text = row.get(channel, "")
        if channel in missing:
            files.append(None)
            continue
        path, problem = table_path(folder, text) if text else (Path(), f"{row['Id']} has no path for {channel}")
        fault = fault or problem
        files.append(path)
    return NewImage(row["Id"], tuple(files), missing=missing, pixel_size=size, fault=fault)


def wrong_colours(words: Sequence[str]) -> str:
    """Return what is wrong with a list of missing colours; '' if nothing is."""
    wrong = [word for word in words if word not in CHANNELS]
    if wrong:
        return f"missing is {wrong[0]!r}; expected some of {', '.join(CHANNELS)}"
    return "green, the channel of the protein, cannot be missing: it is what is predicted" if "green" in words else ""


def table_path(folder: Path, text: str) -> tuple[Path, str]:
    """Return a path of a table, and what is wrong with it; nothing but regular files and OME-Zarr folders is opened."""
    if "\0" in text:
        return folder, f"{text!r} is no path"
    path = folder / text
    is_zarr = (stacks.stack_suffix(path.name) or "").endswith("zarr") and path.is_dir()
    return path, "" if path.is_file() or is_zarr else f"{path} is missing"


def with_state(image: NewImage) -> NewImage:
    """Return an image with the state of its files: names, sizes, and times of change."""
    if image.fault:
        return image
    files = [inner for path in image.paths for inner in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    try:
        stats = [(str(path), path.stat()) for path in files]
    except OSError as error:
        return replace(image, fault=f"{error.filename}: {error.strerror}")
    state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return replace(image, state=digest([image.Id, image.missing, image.pixel_size, state]))


# --- checking ----------------------------------------------------------------------------------------------


def check(images: Sequence[NewImage], options: InputOptions, n_jobs: int) -> list[NewImage]:
    """Return the images with their sizes in pixels and micrometres, after reading their headers; bad ones get a fault.

    n_jobs : processes that read headers
    """
    checked = list(images)
    todo = [k for k, image in enumerate(images) if not image.fault]
    jobs = [(check_one, images[k], options) for k in todo]
    for place, result in run_parallel(attempt, jobs, n_jobs if len(todo) > FEW else 1, "checking", "images"):
        k = todo[place]
        checked[k] = replace(images[k], fault=str(result)) if isinstance(result, BadImage) else result
    return checked


def check_one(image: NewImage, options: InputOptions) -> NewImage:
    """Return an image with what its headers say; raises BadImage with the file's name."""
    return check_stack(image, options) if image.stack else check_files(image)


def check_files(image: NewImage) -> NewImage:
    """Return an image with a file per channel with its size in pixels."""
    sizes = {}
    for path in image.paths:
        with named(path), sources.opened(path, rgb_coded=True, square=False) as (header, _):
            sizes[path.name] = (header.height, header.width)
    check_one_size(sizes)
    height, width = next(iter(sizes.values()))
    size = image.pixel_size or file_pixel_size(image.paths)
    return replace(image, height=height, width=width, pixel_size=size)


def check_one_size(sizes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse channels of different sizes; sizes : file -> (height, width)."""
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {width} x {height}" for name, (height, width) in sizes.items())
        raise BadImage(f"channels of different sizes: {found} px")


def file_pixel_size(paths: Sequence[Path]) -> float | None:
    """Return the pixel size that the files of single channels agree on; None if they are no TIFFs, or do not say."""
    found = set()
    for path in paths:
        if not stacks.stack_suffix(path.name):
            return None
        try:
            with stacks.opened_stack(path) as (header, _):
                found.add(header.pixel_size)
        except BadImage:  # a colour image, say: its own reader has the last word
            return None
    return found.pop() if len(found) == 1 else None


def check_stack(image: NewImage, options: InputOptions) -> NewImage:
    """Return an image with all channels in one file with its size and the order of its channels."""
    assert image.stack
    with named(image.stack), stacks.opened_stack(image.stack) as (header, _):
        order = stacks.channel_order(header.names, options.channels, image.missing)
        if order[CHANNELS.index("green")] is None:
            raise BadImage("has no channel for green, the protein: it is what is predicted")
        places = [place for place in order if place is not None]
        if len(set(places)) < len(places):
            raise BadImage("would use one channel twice; give --channels with a different one for each colour")
    lacking = tuple(channel for channel, place in zip(CHANNELS, order, strict=True) if place is None)
    return replace(
        image,
        order=order,
        missing=lacking,
        height=header.height,
        width=header.width,
        pixel_size=image.pixel_size or header.pixel_size,
    )


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put a file's name before the text of a BadImage that is raised inside."""
    try:
        yield
    except BadImage as error:
        raise BadImage(f"{path} {error}") from None


def refuse_bad(images: Sequence[NewImage], out: Path, options: InputOptions, finished: str = "") -> None:
    """Write bad_files.csv with the faulty images and their reasons; raise a UserError unless --keep-going is given.

    finished : what has been done for the others, for the message
    """
    bad, report = [image for image in images if image.fault], out / BAD_FILES
    if not bad:
        return
    write_csv(report, pd.DataFrame({"Id": [b.Id for b in bad], "reason": [b.fault for b in bad]}))
    found = f"{len(bad)} of {len(images)} images cannot be used (all of them in {report}):\n" + listing(
        f"{image.Id}: {image.fault}" for image in bad
    )
    if not options.keep_going or len(bad) == len(images):
        raise UserError(
            f"{found}\nfix or remove them and run this again, or leave them out with --keep-going{finished}"
        )
    print(f"warning: {found}")


# --- reading -----------------------------------------------------------------------------------------------


def read_image(image: NewImage) -> tuple[Planes, dict]:
    """Decode the planes of an image, and note how its files use their range of values (see `exposure.judge`).

    Raises BadImage with the file's name.
    """
    planes, misplaced = read_stack(image) if image.stack else read_files(image)
    there = [plane for plane in planes if plane is not None]
    if {plane.shape for plane in there} != {(image.height, image.width)}:
        raise BadImage(f"{image.paths[0]} has changed while it was read; run this again")
    ranges = [exposure.used_range(plane) for plane in there if plane.dtype == np.uint16]
    return planes, {"ranges": ranges, "misplaced": misplaced}


def read_stack(image: NewImage) -> tuple[Planes, dict]:
    """Decode the planes of a file with all channels."""
    assert image.stack
    with named(image.stack), stacks.opened_stack(image.stack) as (_, decode):
        return [None if place is None else decode(place) for place in image.order], {}


def read_files(image: NewImage) -> tuple[Planes, dict]:
    """Decode the planes of an image with a file per channel, and name colour files with their signal elsewhere."""
    planes: Planes = []
    misplaced = {}
    for path, channel in zip(image.files, CHANNELS, strict=True):
        if path is None:
            planes.append(None)
            continue
        with named(path):
            pixels = sources.read_pixels(path, rgb_coded=True, square=False)
        planes.append(sources.channel_plane(pixels, channel))
        if pixels.ndim == 3 and (place := exposure.signal_elsewhere(pixels, sources.RGB_PLANES[channel])):
            misplaced[path.name] = place
    return planes, misplaced
