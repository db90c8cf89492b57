"""What the store costs: bytes a sample, milliseconds to write it and to read a random crop, against other formats.

On HPA_REAL_DATA's full-size samples at 768 px (crops of 512) and its PNG samples at 512 px (crops of 384), one core,
files in the page cache. A crop is read by reading the whole image. `write` is without, `flushed` with the fsync that
stage 01 does for each file before it renames it into place. The formats take turns; medians over samples and repeats.

example HPA_REAL_DATA=real python benchmarks/store.py
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

os.environ["TIFFFILE_NUM_THREADS"] = "1"  # read when tifffile is loaded

import cv2
import numpy as np
import tifffile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli, images, sources
from common.files import writing
from real_data import real


def parse_args():
    parser = cli.Parser(__doc__)
    parser.add_argument("--samples", type=cli.positive, default=63, metavar="N", help="PNG samples at most (default: 63)")
    parser.add_argument("--repeats", type=cli.positive, default=5, metavar="N", help="passes over the samples (default: 5)")
    return parser.parse_args()


def main():
    args = parse_args()
    cv2.setNumThreads(1)
    full = [np.stack([images.resize(plane, 768) for plane in planes]) for planes in samples(real("kaggle_tiff"), 2)]
    png = [np.stack(planes) for planes in samples(real("kaggle_png"), args.samples)]
    figures = {}
    for stored, crop, repeats in ((full, 512, args.repeats * 5), (png, 384, args.repeats)):
        side = stored[0].shape[1]
        print(f"{len(stored)} samples of {side} px, crops of {crop}\n{'format':18s} {'bytes':>9s} {'write ms':>9s} "
              f"{'flushed ms':>10s} {'crop ms':>8s} {'crops/s a core':>14s} {'same pixels':>11s}")
        figures[side] = measure(stored, crop, repeats)
        for name, row in figures[side].items():
            print("{0:18s} {bytes:9d} {write_ms:9.2f} {flushed_ms:10.2f} {crop_ms:8.2f} {crops_per_s:14.1f} {same!s:>11s}"
                  .format(name, **row))
    print(json.dumps(figures))


def samples(data: Path, limit: int):
    """Yield the planes of the samples of an input folder."""
    folder = next(folder for folder in (data / "train_full_size", data / "train") if folder.is_dir())
    files = sources.list_files(folder)
    for Id in sorted({stem.rsplit("_", 1)[0] for stem in files})[:limit]:
        yield sources.read_sample(sources.channel_files(Id, [files])[0])


# --- the formats: write(path, planes), read(path) -> (4, side, side) ---------------------------------------

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


def formats() -> dict:
    return {"TIFF (ours)": (images.write_planes, images.read_planes), "4 PNGs": (write_png, read_png),
            "TIFF uncompressed": (tiff_writer(), tifffile.imread),
            "TIFF zstd": (tiff_writer(compression="zstd", predictor=True), tifffile.imread)}


# --- measuring ---------------------------------------------------------------------------------------------

def measure(stored: list, crop: int, repeats: int) -> dict:
    """Return format -> bytes a sample, median milliseconds and crops a second."""
    rng, times, sizes, same = np.random.default_rng(0), {}, {}, {}
    for k in range(repeats):
        for i, planes in enumerate(stored):
            for name, (write, read) in formats().items():
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, "image.tif")
                    times.setdefault((name, "flushed_ms"), []).append(milliseconds(write, path, planes))
                    with patch("os.fsync"):
                        times.setdefault((name, "write_ms"), []).append(milliseconds(write, path, planes))
                    corner = rng.integers(planes.shape[1] - crop + 1, size=2)
                    times.setdefault((name, "crop_ms"), []).append(milliseconds(cut, read, path, crop, corner))
                    if k == 0:
                        sizes.setdefault(name, []).append(sum(file.stat().st_size for file in Path(folder).iterdir()))
                        same[name] = same.get(name, True) and np.array_equal(read(path), planes)
    return {name: {"bytes": round(np.mean(sizes[name])), "same": bool(same[name]),
                   **{what: round(median(times[name, what]), 3) for what in ("write_ms", "flushed_ms", "crop_ms")},
                   "crops_per_s": round(1000 / median(times[name, "crop_ms"]), 1)} for name in formats()}


def cut(read, path: Path, crop: int, corner) -> np.ndarray:
    top, left = corner
    return np.ascontiguousarray(read(path)[:, top:top + crop, left:left + crop])


def milliseconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return (time.perf_counter() - started) * 1000


if __name__ == "__main__":
    cli.run(main)
