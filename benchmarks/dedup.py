"""Measure stage 02's three parts: hashes per second, the search among all pairs, and the share of duplicates it finds.

hash    pHash of red, green and blue of the stored 128 px images (`hash_planes`), against imagehash on the whole image
search  `find_pairs` on random 64-bit triples with planted near pairs, against NumPy in blocks for up to 42,774. Each
        runs in its own process and must find the same pairs. Memory is the growth of the process. faiss uses all cores
recall  each real sample of HPA_REAL_DATA/kaggle_png against a changed copy of itself, and false matches among pairs of
        different real samples, by threshold: the bits of 64 within which red, green and blue must all match

example HPA_REAL_DATA=real python benchmarks/dedup.py --sizes 10000,42774,117000,1000000
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import cv2
import imagehash
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from real_data import real

from common.data.duplicates import find_pairs, hash_planes
from common.data.images import read_planes, resize, write_planes
from common.data.sources import channel_files, list_files, read_sample
from common.process import command_line
from common.process.main import run

ORACLE_LIMIT = 42774  # hashes; above that NumPy takes minutes
THRESHOLD = (12, 12, 12)
THRESHOLDS = (4, 6, 8, 10, 12, 14, 16)


def parse_args():
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--sizes",
        type=lambda text: [command_line.positive(n) for n in text.split(",")],
        metavar="N,N",
        default=[10000, 42774, 117000, 1000000],
        help="numbers of hashes (default: 10000,42774,117000,1000000)",
    )
    parser.add_argument(
        "--repeats",
        type=command_line.positive,
        default=3,
        metavar="N",
        help="runs of hashing (the median counts) and of searches that NumPy also does (the fastest; default: 3)",
    )
    parser.add_argument(
        "--search", nargs=2, metavar=("WHO", "N"), help="run one search in this process and print its JSON"
    )
    args = parser.parse_args()
    if min(args.sizes) < 1000:
        parser.error("--sizes must be at least 1000")
    return args


def main():
    args = parse_args()
    if args.search:
        print(json.dumps(search(args.search[0], int(args.search[1]))))
        return
    samples, full = read_samples(real("kaggle_png")), read_samples(real("kaggle_tiff"))
    print(
        f"{'search':>10s} {'pairs':>8s} {'planted':>8s} {'s':>8s} {'MiB':>6s} {'NumPy s':>8s} {'MiB':>6s} same",
        flush=True,
    )
    searches = [compare_search(n, args.repeats) for n in args.sizes]
    print(json.dumps({"hash": hash_speed(samples, full, args.repeats), "search": searches, "recall": recall(samples)}))


def read_samples(data: Path) -> list:
    """Return the (4, side, side) planes of all samples in the image folders of an input folder."""
    samples = []
    for part in ("train_full_size", "train", "test"):
        files = list_files(data / part)
        for Id in sorted({stem.rsplit("_", 1)[0] for stem in files}):
            samples.append(np.stack(read_sample(channel_files(Id, [files])[0])))
    return samples


# --- hashes per second -------------------------------------------------------------------------------------


def hash_speed(samples: list, full: list, repeats: int) -> dict:
    """Time hashing of stored images on one core, with and without reading them, and print both."""
    cv2.setNumThreads(1)
    figures = {}
    print(
        f"\n{'samples/s on one core':24s} {'128 px, ours':>14s} {'whole image':>14s} {'ratio':>7s} {'bits apart':>11s}"
    )
    for stored in (samples, [np.stack([resize(plane, 768) for plane in planes]) for planes in full] * 4):
        seconds, apart = time_hashing(stored, repeats)
        for what in ("hash", "read and hash"):
            name = f"{what}, {len(stored[0][0])} px"
            ours, whole = (1 / median(seconds[who, what]) for who in ("ours", "whole"))
            figures[name] = {
                "ours": round(ours, 1),
                "whole": round(whole, 1),
                "ratio": round(ours / whole, 2),
                "mean_bits_apart": round(apart, 2),
            }
            print(
                "{0:24s} {ours:14.1f} {whole:14.1f} {ratio:7.2f} {mean_bits_apart:11.2f}".format(name, **figures[name])
            )
    return figures


def time_hashing(stored: list, repeats: int) -> tuple[dict, float]:
    """Return (who, what) -> seconds per image and repeat, and the mean distance between the two hashes of a channel."""
    seconds, hashes = {}, {}
    contestants = {"ours": (128, lambda planes: hash_planes(planes)[0]), "whole": (len(stored[0][0]), plain_hashes)}
    with tempfile.TemporaryDirectory() as folder:
        for who, (size, _) in contestants.items():
            for i, planes in enumerate(stored):
                write_planes(Path(folder, who, f"{i}.tif"), np.stack([resize(plane, size) for plane in planes]))
        for i in [*range(len(stored))] * repeats:
            for who, (_, function) in contestants.items():
                started = time.perf_counter()
                planes = read_planes(Path(folder, who, f"{i}.tif"))
                read = time.perf_counter()
                hashes[who, i] = function(planes)
                ended = time.perf_counter()
                seconds.setdefault((who, "hash"), []).append(ended - read)
                seconds.setdefault((who, "read and hash"), []).append(ended - started)
    apart = [np.bitwise_count(hashes["ours", i] ^ hashes["whole", i]).sum(axis=1).mean() for i in range(len(stored))]
    return seconds, float(np.mean(apart))


def plain_hashes(planes):
    return np.stack([np.packbits(imagehash.phash(Image.fromarray(plane)).hash) for plane in planes[:3]])


# --- search among all pairs --------------------------------------------------------------------------------


def compare_search(n: int, repeats: int) -> dict:
    """Run the searches in turn and print the fastest of each."""
    who = ("ours", "numpy") if n <= ORACLE_LIMIT else ("ours",)
    runs = {name: [] for name in who}
    for _ in range(repeats if len(who) > 1 else 1):
        for name in who:
            command = [sys.executable, __file__, "--search", name, str(n)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(result.stdout.splitlines()[-1]))
    best = {name: min(results, key=lambda run: run["seconds"]) for name, results in runs.items()}
    ours, numpy = best["ours"], best.get("numpy")
    row = {
        "n": n,
        **ours,
        "numpy_seconds": numpy and numpy["seconds"],
        "numpy_mib": numpy and numpy["mib"],
        "identical": numpy and ours["digest"] == numpy["digest"],
    }
    print(
        "{n:10,d} {pairs:8,d} {planted_found:8.3f} {seconds:8.2f} {mib:6.0f}".format(**row)
        + (" {numpy_seconds:8.2f} {numpy_mib:6.0f} {identical}".format(**row) if numpy else "        -      - -"),
        flush=True,
    )
    return row


def search(who: str, n: int) -> dict:
    """Search n hashes in this process; return the seconds, the growth of peak memory, and a digest of the pairs."""
    hashes, planted = plant(n)
    flat, before = np.zeros(n, dtype=bool), memory("VmRSS")
    started = time.perf_counter()
    pairs, distances = (find_pairs if who == "ours" else blocked_search)(hashes, flat, THRESHOLD)
    seconds = time.perf_counter() - started
    grown = memory("VmHWM") - before
    found = planted[np.isin(planted @ [n, 1], pairs @ [n, 1])]
    return {
        "seconds": round(seconds, 3),
        "mib": round(grown),
        "pairs": len(pairs),
        "planted_found": round(len(found) / len(planted), 4),
        "digest": hashlib.sha256(np.hstack([pairs, distances]).astype(np.int64).tobytes()).hexdigest(),
    }


def plant(n: int):
    """Return random hashes (n, 3, 8) and planted pairs (n // 100, 2) within the threshold.

    As many other pairs are planted one bit too far apart in one channel.
    """
    rng = np.random.default_rng(n)
    hashes = rng.integers(256, size=(n, 3, 8), dtype=np.uint8)
    rows = rng.permutation(n)[: n // 100 * 4].reshape(-1, 2)
    for i, (first, second) in enumerate(rows):
        flips = rng.integers(THRESHOLD[0] + 1, size=3)
        if i % 2:
            flips[rng.integers(3)] = THRESHOLD[0] + 1
        mask = np.zeros((3, 64), dtype=np.uint8)
        for channel, count in enumerate(flips):
            mask[channel, rng.permutation(64)[:count]] = 1
        hashes[second] = hashes[first] ^ np.packbits(mask, axis=1)
    return hashes, np.sort(rows[::2], axis=1)


def blocked_search(hashes, flat, thresholds, block: int = 64):
    """Find the same pairs as `find_pairs` by comparing blocks of rows with all later rows in NumPy; ignores `flat`."""
    words = np.ascontiguousarray(hashes).view(np.uint64)[:, :, 0].T.copy()  # (3, n)
    found = []
    for start in range(0, len(hashes), block):
        near = np.bitwise_count(words[1, start : start + block, None] ^ words[1, None, start:]) <= thresholds[1]
        first, second = np.nonzero(np.triu(near, 1))
        distances = np.bitwise_count(words[:, start + first] ^ words[:, start + second]).T.astype(np.int64)
        keep = (distances <= thresholds).all(axis=1)
        found.append(np.column_stack([start + first, start + second, distances])[keep])
    table = np.concatenate(found)
    return table[:, :2], table[:, 2:]


def memory(what: str) -> float:
    """Return this process's VmRSS or VmHWM (the peak) in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


# --- recall on planted duplicates --------------------------------------------------------------------------


def changes() -> dict:
    """Return name -> function of a plane (uint8) that makes a near-duplicate of it."""
    rng = np.random.default_rng(0)

    def jpeg(quality):
        return lambda p: cv2.imdecode(
            cv2.imencode(".jpg", p, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE
        )

    def to_8_bit(values):
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)

    def smaller_and_back(p):
        small = cv2.resize(p, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA)
        return cv2.resize(small, p.shape[::-1], interpolation=cv2.INTER_LINEAR)

    return {
        "JPEG quality 90": jpeg(90),
        "JPEG quality 70": jpeg(70),
        "brightness +10 %": lambda p: to_8_bit(p * 1.1),
        "brightness -10 %": lambda p: to_8_bit(p * 0.9),
        "2 % Gaussian noise": lambda p: to_8_bit(p + rng.normal(0, 0.02 * 255, p.shape)),
        "1 px shift": lambda p: np.pad(p, ((1, 0), (1, 0)), mode="edge")[:-1, :-1],
        "to 3/4 and back": smaller_and_back,
    }


def recall(samples: list) -> dict:
    """Print and return the share of changed copies found and the false matches, by threshold."""

    def hashed(planes):
        return hash_planes(np.stack([resize(plane, 128) for plane in planes]))

    originals, flat = (np.stack(values) for values in zip(*map(hashed, samples), strict=True))
    limits = np.array(THRESHOLDS)
    print(f"\n{f'recall, {len(samples)} samples':24s}" + "".join(f"{t:>7d}" for t in limits) + f"{'most bits':>11s}")
    figures = {"thresholds": list(THRESHOLDS), "samples": len(samples), "flat": int(flat.sum())}
    for name, change in changes().items():
        copies = np.stack([hashed([change(plane) for plane in planes[:3]])[0] for planes in samples])
        bits = np.bitwise_count(originals ^ copies).sum(axis=2).max(axis=1)  # in the worst channel
        figures[name] = [round(float((bits[~flat] <= t).mean()), 4) for t in limits]
        print(f"{name:24s}" + "".join(f"{share:7.3f}" for share in figures[name]) + f"{bits[~flat].max():11d}")
    figures["false_matches"] = [len(find_pairs(originals, flat, (t, t, t))[0]) for t in THRESHOLDS]
    print(
        f"{'false matches':24s}"
        + "".join(f"{n:7d}" for n in figures["false_matches"])
        + f"   of {len(samples) * (len(samples) - 1) // 2} pairs; {flat.sum()} samples have a flat channel and match "
        "nothing"
    )
    return figures


if __name__ == "__main__":
    run(main)
