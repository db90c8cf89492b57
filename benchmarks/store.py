"""Measure the store: bytes per sample, milliseconds to write and read it, against other formats and the earlier one.

Uses HPA_REAL_DATA's full-size samples at 768 px (crops of 512) and its PNG samples at 512 px (crops of 384), on one
core, with files in the page cache. Times are processor time, which other work on the machine affects least. `crop` is
the work for a training image before batching: read, compare with the checksum if the format has one, channels last,
cut. `whole` is the same for an evaluation image. `write` is without, `flushed` (wall clock) with the fsync that stage
01 does for each file before it renames it into place. The formats take turns. Figures are medians over repeats, means
over samples, and ratios to this project's earlier format.

With --loader: images per second of stage 04's loader, with 0, 1 and 2 processes, for each store.

example HPA_REAL_DATA=real python benchmarks/store.py
        HPA_REAL_DATA=real python benchmarks/store.py --loader
"""

import json
import os
import sys
import tempfile
import time
import zlib
from itertools import product
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

os.environ["TIFFFILE_NUM_THREADS"] = "1"  # read when tifffile is loaded

import cv2
import numpy as np
import tifffile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from real_data import real

from common.artifacts.files import writing
from common.data import images, sources
from common.process import command_line
from common.process.main import run
from common.train.dataset import Cache, EpochBatches, ImageSet, loader

EARLIER, OURS, RAW = "TIFF deflate+predictor, zlib.crc32", "TIFF (ours)", "TIFF raw (ours)"
BATCH = 16


def parse_args():
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--samples", type=command_line.positive, default=63, metavar="N", help="PNG samples at most (default: 63)"
    )
    parser.add_argument(
        "--repeats", type=command_line.positive, default=5, metavar="N", help="passes over the samples (default: 5)"
    )
    parser.add_argument("--loader", action="store_true", help="time the loader")
    parser.add_argument(
        "--batches",
        type=command_line.positive,
        default=40,
        metavar="N",
        help=f"batches of {BATCH} per loader; the first eighth does not count (default: 40)",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    cv2.setNumThreads(1)
    full = [np.stack([images.resize(plane, 768) for plane in planes]) for planes in samples(real("kaggle_tiff"), 2)]
    png = [np.stack(planes) for planes in samples(real("kaggle_png"), args.samples)]
    figures = {}
    for stored, crop, repeats in ((full, 512, args.repeats * 5), (png, 384, args.repeats)):
        print(f"{len(stored)} samples of {stored[0].shape[1]} px, crops of {crop}")
        show = loaders if args.loader else formats_compared
        figures[stored[0].shape[1]] = show(stored, crop, args.repeats if args.loader else repeats, args.batches)
    print(json.dumps(figures))


def samples(data: Path, limit: int):
    """Yield the planes of the samples of an input folder."""
    folder = next(folder for folder in (data / "train_full_size", data / "train") if folder.is_dir())
    files = sources.list_files(folder)
    for Id in sorted({stem.rsplit("_", 1)[0] for stem in files})[:limit]:
        yield sources.read_sample(sources.channel_files(Id, [files])[0])


# --- the formats: write(path, planes), read(path, crc, window) -> (4, side, side) or that window -----------


def write_png(path, planes):
    for channel, plane in zip(images.CHANNELS, planes, strict=True):
        with writing(path.with_name(f"{path.name}_{channel}.png")) as temporary:
            cv2.imwrite(str(temporary), plane)


def read_png(path):
    return np.stack([cv2.imread(f"{path}_{channel}.png", cv2.IMREAD_GRAYSCALE) for channel in images.CHANNELS])


def tiff_writer(**how):
    def write(path, planes):
        with writing(path) as temporary:
            tifffile.imwrite(temporary, planes, photometric="minisblack", **how)

    return write


def read_earlier(path, crc):
    with tifffile.TiffFile(path) as tiff:
        if max(tiff.pages.first.shape) > images.MAX_SIDE:
            raise ValueError
        planes = tiff.asarray(maxworkers=1)
    if f"{zlib.crc32(np.ascontiguousarray(planes)):08x}" != crc:
        raise ValueError
    return planes


def then_cut(read):
    """Return a reader that cuts the window out of a whole image, channels last."""

    def cut(path, crc, window):
        image = channels_last(read(path, crc))
        if window is None:
            return image
        top, left = (images.corner(share, window[0], image.shape[1]) for share in window[1:])
        return image[:, top : top + window[0], left : left + window[0]]

    return cut


def channels_last(planes):
    return cv2.merge(list(planes)).transpose(2, 0, 1)


def read_ours(path, crc, window):
    return channels_last(images.read_planes(path, crc, window, lent=True))


FORMATS = {
    EARLIER: (
        tiff_writer(metadata={"axes": "CYX", "channels": images.CHANNELS}, compression="zlib", predictor=True),
        then_cut(read_earlier),
    ),
    OURS: (images.write_planes, read_ours),
    RAW: (lambda path, planes: images.write_planes(path, planes, raw=True), read_ours),
    "TIFF zstd, no checksum": (
        tiff_writer(compression="zstd", predictor=True),
        then_cut(lambda path, _: tifffile.imread(path)),
    ),
    "4 PNGs, no checksum": (write_png, then_cut(lambda path, _: read_png(path))),
    "earlier files, read as ours": (None, read_ours),
}


# --- measuring ---------------------------------------------------------------------------------------------


def formats_compared(stored: list, crop: int, repeats: int, _) -> dict:
    """Print and return format -> bytes per sample, milliseconds, and their ratios to the earlier format's."""
    rng, times, sizes, same = np.random.default_rng(0), {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for k, (i, planes) in product(range(repeats), enumerate(stored)):
            window = (crop, *rng.random(2))
            cut = then_cut(lambda *_, planes=planes: planes)(None, None, window)
            for name in rng.permutation(list(FORMATS)):
                write, read = FORMATS[name]
                path = Path(folder, str(list(FORMATS).index(name if write else EARLIER)), f"{i}.tif")
                crc = images.checksum(planes)
                timed = {"crop": (read, path, crc, window), "whole": (read, path, crc, None)}
                if k == 0:
                    (write or FORMATS[EARLIER][0])(path, planes)
                    sizes.setdefault(name, []).append(
                        sum(file.stat().st_size for file in path.parent.glob(f"{i}.tif*"))
                    )
                    same[name] = same.get(name, True) and np.array_equal(read(path, crc, window), cut)
                if write:
                    timed["flushed"] = write, path, planes
                    with patch("os.fsync"):
                        took = milliseconds(time.process_time, write, path, planes)
                    times.setdefault((name, "write"), {}).setdefault(i, []).append(took)
                for what in map(str, rng.permutation(list(timed))):
                    call = timed[what]
                    clock = time.perf_counter if what == "flushed" else time.process_time
                    times.setdefault((name, what), {}).setdefault(i, []).append(milliseconds(clock, *call))
    rows = {
        name: {
            "same": bool(same[name]),
            "bytes": mean(sizes[name]),
            **{
                f"{what}_ms": mean(map(median, times[name, what].values()))
                for what in ("crop", "whole", "write", "flushed")
                if (name, what) in times
            },
        }
        for name in FORMATS
    }
    columns = ("bytes", "crop ms", "whole ms", "write ms", "flushed ms", "same")
    print(f"{'format':36s}" + "".join(f"{what:>20s}" for what in columns))
    for name, row in rows.items():
        row.update({f"{what}_ratio": round(row[what] / rows[EARLIER][what], 3) for what in [*row] if what != "same"})
        cells = [
            f"{row[what]:12.{digits}f} ({row[f'{what}_ratio']:5.3f})" if what in row else ""
            for what, digits in (("bytes", 0), ("crop_ms", 2), ("whole_ms", 2), ("write_ms", 1), ("flushed_ms", 1))
        ]
        print(f"{name:36s}" + "".join(f"{cell:>20s}" for cell in cells) + f"{row['same']!s:>20s}")
        row.update({what: round(value, 3) for what, value in row.items() if what != "same"})
    return rows


def milliseconds(clock, function, *arguments) -> float:
    started = clock()
    function(*arguments)
    return (clock() - started) * 1000


# --- the loader --------------------------------------------------------------------------------------------


class Earlier(ImageSet):
    """An image set that reads whole images, as this project did earlier."""

    def read(self, Id, window=None):
        return channels_last(read_earlier(self.folder / f"{Id}.tif", self.crcs[Id]))


def loaders(stored: list, crop: int, repeats: int, batches: int) -> dict:
    """Print and return store -> images per second with 0, 1 and 2 loader processes, and ratios to the earlier store."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        sets = {}
        for name, kind in ((EARLIER, Earlier), (OURS, ImageSet), (RAW, ImageSet)):
            place = Path(folder, str(len(sets)))
            for i, planes in enumerate(stored):
                FORMATS[name][0](place / f"{i}.tif", planes)
            ids = np.array([str(i) for i in range(len(stored))])
            crcs = {Id: images.checksum(planes) for Id, planes in zip(ids, stored, strict=True)}
            rows = np.resize(ids, batches * BATCH)
            sets[name] = kind(place, rows, np.zeros((len(rows), 28), bool), crop, crcs=crcs, cache=Cache(room=0))
        for k in range(repeats):
            for workers, name in product((0, 1, 2), sets):
                rates.setdefault((name, workers), []).append(images_a_second(sets[name], workers, k))
    figures = {
        name: {
            workers: {
                "images_per_s": round(median(rates[name, workers]), 1),
                "ratio": round(median(rates[name, workers]) / median(rates[EARLIER, workers]), 2),
            }
            for workers in (0, 1, 2)
        }
        for name in sets
    }
    print(f"{'images/s by loader processes':36s}" + "".join(f"{workers:>20d}" for workers in (0, 1, 2)))
    for name, row in figures.items():
        cells = [f"{cell['images_per_s']:12.1f} ({cell['ratio']:4.2f})" for cell in row.values()]
        print(f"{name:36s}" + "".join(f"{cell:>20s}" for cell in cells))
    return figures


def images_a_second(dataset: ImageSet, workers: int, epoch: int) -> float:
    """Return the images per second of one epoch after its first batches, which include the start of processes."""
    batches = EpochBatches(len(dataset), BATCH, 0, epoch)
    skipped = len(batches) // 8
    for k, _ in enumerate(loader(dataset, workers, False, batches)):
        if k == skipped:
            started = time.perf_counter()
    return (len(batches) - skipped - 1) * BATCH / (time.perf_counter() - started)


if __name__ == "__main__":
    run(main)
