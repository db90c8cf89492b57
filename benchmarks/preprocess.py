"""Measure how close stage 01 is to the limit of files and codecs, and how far ahead of the usual script.

Full-size samples are made from the two real ones in HPA_REAL_DATA/kaggle_tiff by rotations, flips and rolls. These run
in turn, repeatedly, on the same files and cores, each in its own processes:
stage01  01_preprocess.py --recipes resnet50: checks headers, stores 768 and 128 px and flushes them to disk, writes
         statistics and the journal
bare     a pool that reads, shrinks and writes the same two sizes with the same calls, and nothing else
usual    a pool with Pillow: open, LANCZOS to 768 px, one PNG per channel
Each processes a quarter of the samples, all of them, and all of them four times (the same files under other names).
`samples/s` is for all of them, including the start of Python and its workers. `further` is for the three additional
rounds, without any start: the speed on a large collection. The fastest run of --repeats counts, which is steadier than
the median for a difference. Memory is the largest sum of resident sets of all processes, sampled every 50 ms.

example HPA_REAL_DATA=real python benchmarks/preprocess.py --samples 40
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from real_data import real

from common.errors import UserError
from common.process import command_line
from common.process.main import run

CHANNELS = ("red", "green", "blue", "yellow")
LEVEL = 6  # of zstd, as in stage 01 for large images
SIZES = (128, 768)
SECONDS_BETWEEN_LOOKS = 0.05


def parse_args():
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--samples", type=command_line.positive, default=40, metavar="N", help="samples to make (default: 40)"
    )
    parser.add_argument(
        "--repeats", type=command_line.positive, default=3, metavar="N", help="runs of each (default: 3)"
    )
    parser.add_argument(
        "--jobs", type=command_line.positive, default=os.cpu_count(), metavar="N", help="processes (default: all)"
    )
    parser.add_argument(
        "--loop", nargs=3, metavar=("NAME", "DATA", "WORK"), help="run one of the loops in this process"
    )
    args = parser.parse_args()
    if args.samples < 4:
        parser.error("--samples must be at least 4")
    return args


def main():
    args = parse_args()
    if args.loop:
        run_loop(*args.loop, args.jobs)
        return
    with tempfile.TemporaryDirectory() as folder:
        counts = (args.samples // 4, args.samples, 4 * args.samples)
        folders = make_samples(real("kaggle_tiff"), Path(folder), args.samples, counts)
        runs = {}
        for _ in range(args.repeats):
            for count, data in folders.items():
                for name in ("stage01", "bare", "usual"):
                    with tempfile.TemporaryDirectory(dir=folder) as work:
                        os.sync()  # no run flushes what another one wrote
                        runs.setdefault((name, count), []).append(watch(command(name, data, work, args.jobs)))
    best = {
        key: (min(seconds for seconds, _ in results), max(mib for _, mib in results)) for key, results in runs.items()
    }
    report(best, *counts, args.jobs)


def make_samples(source: Path, folder: Path, made: int, counts: tuple[int, ...]) -> dict[int, Path]:
    """Write `made` samples, and per count an input folder with that many in its train.csv; the rest are links."""
    import numpy as np
    import tifffile

    images = folder / "images"
    images.mkdir()
    Ids = sorted(path.name.removesuffix("_green.tif") for path in (source / "train_full_size").glob("*_green.tif"))
    planes = {
        Id: [tifffile.imread(source / "train_full_size" / f"{Id}_{channel}.tif") for channel in CHANNELS] for Id in Ids
    }
    rng = np.random.default_rng(0)
    for i in range(made):
        which, shift = rng.integers(8), tuple(rng.integers(2048, size=2))
        for channel, plane in zip(CHANNELS, planes[Ids[i % len(Ids)]], strict=True):
            plane = np.rot90(plane if which < 4 else plane[:, ::-1], which % 4)
            plane = np.roll(plane, shift, axis=(0, 1))
            tifffile.imwrite(images / f"s{i:04d}_{channel}.tif", plane, photometric="minisblack")
    for i in range(made, max(counts)):
        for channel in CHANNELS:
            (images / f"s{i:04d}_{channel}.tif").hardlink_to(images / f"s{i % made:04d}_{channel}.tif")
    folders = {count: folder / f"data{count}" for count in counts}
    for count, data in folders.items():
        data.mkdir()
        (data / "train_full_size").symlink_to(images)
        (data / "train.csv").write_text("Id,Target\n" + "".join(f"s{i:04d},{i % 28}\n" for i in range(count)))
    return folders


def command(name: str, data: Path, work: str, jobs: int) -> list[str]:
    if name == "stage01":
        return [
            sys.executable,
            f"{ROOT}/01_preprocess.py",
            "--data",
            str(data),
            "--work",
            work,
            "--recipes",
            "resnet50",
            "--jobs",
            str(jobs),
        ]
    return [sys.executable, __file__, "--loop", name, str(data), work, "--jobs", str(jobs)]


def watch(arguments: list[str]) -> tuple[float, float]:
    """Run a command; return the seconds and the peak resident memory of all its processes together, in MiB."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while True:
        try:
            code = process.wait(SECONDS_BETWEEN_LOOKS)
            break
        except subprocess.TimeoutExpired:
            peak = max(peak, resident(process.pid))
    if code:
        raise UserError(f"{' '.join(arguments)} ended with exit code {code}")
    return time.perf_counter() - started, peak / 2**20


def resident(process: int) -> int:
    """Return the resident bytes of a process and its descendants; shared memory counts in each."""
    try:
        size = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = [
            child
            for task in os.listdir(f"/proc/{process}/task")
            for child in Path(f"/proc/{process}/task/{task}/children").read_text().split()
        ]
    except OSError:  # it has ended
        return 0
    return size + sum(resident(int(child)) for child in children)


# --- the two loops, in a process of their own --------------------------------------------------------------


def run_loop(name: str, data: str, work: str, jobs: int) -> None:
    from multiprocessing import get_context

    if name == "bare":
        import cv2

        cv2.setNumThreads(1)
        import tifffile  # noqa: F401 - once, before the processes fork
    Ids = [line.split(",")[0] for line in Path(data, "train.csv").read_text().splitlines()[1:]]
    work = [(Id, Path(data, "train_full_size"), Path(work)) for Id in Ids]
    with get_context("fork").Pool(jobs) as pool:
        for _ in pool.imap_unordered({"bare": bare, "usual": usual}[name], work):
            pass


def bare(job):
    import cv2
    import numpy as np
    import tifffile

    Id, source, target = job
    planes = [tifffile.imread(source / f"{Id}_{channel}.tif") for channel in CHANNELS]
    for size in SIZES:
        small = np.stack([cv2.resize(plane, (size, size), interpolation=cv2.INTER_AREA) for plane in planes])
        tifffile.imwrite(
            target / f"{Id}_{size}.tif",
            small,
            photometric="minisblack",
            compression="zstd",
            rowsperstrip=size,
            compressionargs={"level": LEVEL},
        )


def usual(job):
    from PIL import Image

    Id, source, target = job
    for channel in CHANNELS:
        Image.open(source / f"{Id}_{channel}.tif").resize((768, 768), Image.LANCZOS).save(
            target / f"{Id}_{channel}.png"
        )


# --- the figures -------------------------------------------------------------------------------------------


def report(runs: dict, few: int, all_: int, many: int, jobs: int) -> None:
    """Print a row per contestant, the ratios and the JSON; runs : (name, count) -> seconds, MiB."""
    rows = {}
    print(f"{all_} samples on {jobs} cores")
    print(
        f"{'':8s} {'s':>7s} {'samples/s':>10s} {'further':>8s} "
        + "".join(f"{f'MiB, {count}':>10s}" for count in (few, all_, many))
    )
    for name in ("stage01", "bare", "usual"):
        seconds = runs[name, all_][0]
        further = (many - all_) / max(runs[name, many][0] - seconds, 1e-9)
        peaks = {count: round(runs[name, count][1]) for count in (few, all_, many)}
        rows[name] = {
            "seconds": round(seconds, 2),
            "samples_per_s": round(all_ / seconds, 2),
            "further_per_s": round(further, 2),
            "peak_mib": peaks,
        }
        print(
            f"{name:8s} {seconds:7.2f} {all_ / seconds:10.2f} {further:8.2f}"
            + "".join(f"{peak:10d}" for peak in peaks.values())
        )
    ratios = {
        f"{kind}_stage01_to_{other}": round(rows["stage01"][kind] / rows[other][kind], 3)
        for other in ("bare", "usual")
        for kind in ("samples_per_s", "further_per_s")
    }
    for other, wanted in (("bare", 0.85), ("usual", 2)):
        print(
            f"stage01 / {other}: {ratios[f'samples_per_s_stage01_to_{other}']:.2f} including the start of Python, "
            f"{ratios[f'further_per_s_stage01_to_{other}']:.2f} without (target: at least {wanted})"
        )
    print(json.dumps({"samples": all_, "few": few, "many": many, "jobs": jobs, **rows, **ratios}))


if __name__ == "__main__":
    run(main)
