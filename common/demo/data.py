"""Make demo data: drawn fluorescence images in the layout of the competition, at 1/8 of its size.

python -m common.demo --data demo
"""

import csv
import io
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import tifffile

from common.artifacts.files import writing
from common.artifacts.tables import write_csv
from common.data.images import CHANNELS
from common.demo.drawing import draw_sample
from common.errors import UserError
from common.process import command_line
from common.process.parallel import run_parallel

# Positives per class in the real train.csv. The demo keeps their order on a flatter scale.
REAL_COUNTS = np.array(
    [
        "12885",
        "1254",
        "3621",
        "1561",
        "1858",
        "2513",
        "1008",
        "2822",
        "53",
        "45",
        "28",
        "1093",
        "688",
        "537",
        "1066",
        "21",
        "530",
        "210",
        "902",
        "1482",
        "172",
        "3777",
        "802",
        "2965",
        "322",
        "8228",
        "328",
        "11",
    ],
    dtype=int,
)
LABELS_PER_SAMPLE = (0.50, 0.38, 0.10, 0.02)  # shares of samples with 1, 2, 3 and 4 labels
# Locations that often occur together are drawn together more often than by chance.
COMPANIONS = [
    {0, 25},
    {0, 2},
    {0, 3},
    {0, 5},
    {0, 7},
    {0, 23},
    {1, 6},
    {4, 25},
    {6, 25},
    {9, 10},
    {12, 13},
    {14, 15},
    {16, 25},
    {17, 14},
    {18, 19},
    {21, 22},
    {21, 25},
    {20, 25},
    {24, 25},
    {26, 25},
]


@dataclass(frozen=True)
class Sample:
    """A sample to draw. `index` seeds the drawing; a planted duplicate copies its `source`."""

    id: str
    part: str
    index: int
    labels: tuple[int, ...]
    size: int
    source: "Sample | None" = None


# --- which samples ---------------------------------------------------------------------------------------------------


def class_quotas(n_samples: int) -> np.ndarray:
    """Return how many of `n_samples` samples show each class (28,): a long tail like the real one."""
    per_1000 = 26 + 228 * REAL_COUNTS / REAL_COUNTS.max()
    return np.maximum(1, np.round(per_1000 * n_samples / 1000)).astype(int)


def draw_labels(rng: np.random.Generator, n_samples: int) -> list[tuple[int, ...]]:
    """Draw the labels of each sample, rarest class first; the most common class fills the rest."""
    labels: list[list[int]] = [[] for _ in range(n_samples)]
    sizes = rng.permutation(np.searchsorted(np.cumsum(LABELS_PER_SAMPLE), (np.arange(n_samples) + 0.5) / n_samples) + 1)
    quotas = class_quotas(n_samples)
    for label in np.argsort(REAL_COUNTS, kind="stable").tolist():
        vacant = np.array([i for i in range(n_samples) if len(labels[i]) < sizes[i]], int)
        if not len(vacant):
            break
        weights = np.array([12 if any({label, other} in COMPANIONS for other in labels[i]) else 1 for i in vacant])
        weights = weights * np.array([sizes[i] - len(labels[i]) for i in vacant]) ** 2
        quota = len(vacant) if label == REAL_COUNTS.argmax() else min(quotas[label], len(vacant))
        for i in rng.choice(vacant, quota, replace=False, p=weights / weights.sum()):
            labels[i].append(label)
    return [tuple(found) for found in labels]


def new_id(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def plan_copies(rng: np.random.Generator, originals: list[Sample], n_train: int, n_test: int) -> list[Sample]:
    """Plan near-duplicates of train samples with common labels; every eighth one in train has other labels."""
    n, common_first = n_train + n_test, sorted(originals, key=lambda sample: -REAL_COUNTS[list(sample.labels)].min())
    copies = []
    for k, pick in enumerate(rng.choice(max(len(originals) // 3, n), n, replace=False)):
        source, part = common_first[pick], "train" if k < n_train else "test"
        other = (0,) if source.labels != (0,) else (25,)
        copies.append(
            replace(source, id=new_id(rng), part=part, labels=other if k % 8 == 7 else source.labels, source=source)
        )
    return copies


def plan_samples(rng: np.random.Generator, n_train: int, n_test: int) -> list[Sample]:
    """Plan the train and test samples; about 4 % of train and 5 % of test are planted near-duplicates."""
    if n_train < 10 or n_test < 2:
        raise UserError(f"demo data needs at least 10 train and 2 test samples, found {n_train} and {n_test}")
    n_copies = {"train": -(-n_train // 25), "test": min(-(-n_test // 20), n_train // 4)}
    labelled = [
        (part, labels)
        for part, n in (("train", n_train), ("test", n_test))
        for labels in draw_labels(rng, n - n_copies[part])
    ]
    originals = [
        Sample(new_id(rng), part, index, labels, 256 if rng.random() < 0.6 else 384)
        for index, (part, labels) in enumerate(labelled)
    ]
    copies = plan_copies(rng, [s for s in originals if s.part == "train"], n_copies["train"], n_copies["test"])
    return originals + [replace(copy, index=index) for index, copy in enumerate(copies, len(originals))]


def plan_external(rng: np.random.Generator, first_index: int, n_antibodies: int = 8, n_fields: int = 3) -> list[Sample]:
    """Plan external samples: the fields of one antibody share its labels, mostly rare ones."""
    samples: list[Sample] = []
    for labels in draw_labels(rng, n_antibodies):
        well = f"{rng.choice(list('ABCDEFGH'))}{rng.integers(1, 13)}"
        name = f"{rng.integers(1000, 70000)}_{rng.integers(1, 1500)}_{well}"
        samples += [
            Sample(
                f"{name}_{field}",
                "external",
                first_index + len(samples) + field - 1,
                labels,
                int(rng.choice([256, 288, 384])),
            )
            for field in range(1, n_fields + 1)
        ]
    return samples


# --- files -----------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    with writing(path) as temporary:
        temporary.write_bytes(content)


def encode_tiff(plane: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, plane)
    return buffer.getvalue()


def encode_external(plane: np.ndarray, colour: str) -> bytes:
    """Encode as the atlas does: red in plane R, green in G, blue in B, yellow in both R and G."""
    rgb = [
        plane if letter in {"red": "R", "green": "G", "blue": "B", "yellow": "RG"}[colour] else 0 * plane
        for letter in "RGB"
    ]
    # Full chroma: at 1/8 of the size, half the chroma resolution would visibly blur a single-colour plane.
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.merge(rgb[::-1]), options)[1].tobytes()


def disturb(rng: np.random.Generator, plane: np.ndarray) -> np.ndarray:
    """Return a near-duplicate: shifted by a pixel, slightly brighter or darker, with slightly more noise."""
    noise = rng.normal(0, 1.5, plane.shape)
    return np.clip(np.roll(plane, 1, axis=1) * rng.uniform(0.94, 1.06) + noise, 0, 255).astype(np.uint8)


def sample_paths(folder: Path, sample: Sample) -> dict[str, Path]:
    if sample.part == "external":
        return {colour: folder / "external" / "images" / f"{sample.id}_{colour}.jpg" for colour in CHANNELS}
    return {colour: folder / f"{sample.part}_full_size" / f"{sample.id}_{colour}.tif" for colour in CHANNELS}


def write_sample(folder: Path, seed: int, sample: Sample) -> None:
    """Draw and write one sample."""
    cv2.setNumThreads(1)  # the processes already share the cores
    paths = sample_paths(folder, sample)
    drawn = sample.source or sample
    planes = draw_sample(np.random.default_rng([seed, drawn.index]), drawn.labels, sample.size)
    if sample.source:
        rng = np.random.default_rng([seed, sample.index])
        planes = {colour: disturb(rng, plane) for colour, plane in planes.items()}
    for colour, path in paths.items():
        encoded = encode_external(planes[colour], colour) if sample.part == "external" else encode_tiff(planes[colour])
        write_bytes(path, encoded)


def target(sample: Sample) -> str:
    return " ".join(map(str, sample.labels))


def write_tables(folder: Path, samples: list[Sample]) -> None:
    """Write the CSV files, train.csv last: its presence means that the data is complete."""
    table = pd.DataFrame([(s.id, s.part, target(s)) for s in samples], columns=["Id", "part", "Target"]).sort_values(
        "Id"
    )
    copies = sorted((s.id, s.source.id, s.part) for s in samples if s.source)
    parts = {part: rows[["Id", "Target"]] for part, rows in table.groupby("part")}
    write_csv(folder / "external" / "external.csv", parts["external"])
    write_csv(folder / "planted_duplicates.csv", pd.DataFrame(copies, columns=["Id", "duplicate_of", "part"]))
    write_csv(folder / "sample_submission.csv", parts["test"][["Id"]].assign(Predicted=0))
    write_csv(folder / "train.csv", parts["train"])


def refuse_other_data(folder: Path, samples: list[Sample]) -> None:
    """Raise UserError if train.csv lists samples other than ours: it may be somebody's real data."""
    table = folder / "train.csv"
    if not table.exists():
        return
    with table.open(newline="") as lines:
        found = {row["Id"] for row in csv.DictReader(lines)}
    if found != {s.id for s in samples if s.part == "train"}:
        raise UserError(f"{table} lists samples that are not this demo's; give the demo an empty folder: --data DIR")


def make_demo_data(folder: Path, seed: int = 0, n_train: int = 1000, n_test: int = 120, jobs: int = -1) -> None:
    """Write demo data in the competition's layout; the next run finishes an interrupted one.

    seed : the same seed and numbers give the same bytes, whatever `jobs`
    n_train, n_test : number of samples, planted duplicates included; at least 10 and 2
    jobs : number of processes, -1 for one per core
    Raises UserError if the folder holds other data.
    """
    folder, rng = Path(folder), np.random.default_rng([seed, n_train, n_test])
    samples = plan_samples(rng, n_train, n_test)
    samples += plan_external(rng, len(samples))
    refuse_other_data(folder, samples)
    missing = [s for s in samples if not all(path.exists() for path in sample_paths(folder, s).values())]
    for _ in run_parallel(write_sample, [(folder, seed, sample) for sample in missing], jobs, "demo data"):
        pass
    if missing or not (folder / "train.csv").exists():
        write_tables(folder, samples)


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder to write, created if missing")
    parser.add_argument("--seed", type=command_line.not_negative, default=0)
    arguments = parser.parse_args()
    make_demo_data(arguments.data, arguments.seed)
    print(f"demo data is in {arguments.data}: drawn images in the layout of the competition")
