"""Make labelled images that are real except for the protein: real cells of HPA_REAL_DATA, and a drawn green channel.

The few available real images with labels cannot tell one training from another. Here red, blue and yellow are windows
of the 63 real fields. Green is drawn from the nuclei, the rest of the cells and their rims in these windows, with
texture, varying brightness and noise. There are seven structures. Label sets are as frequent as in the real train.csv
and independent of the field.

example HPA_REAL_DATA=real python benchmarks/half_real.py --out half_real
        python benchmarks/learning.py --data half_real --out learning_half_real --n-folds 2
"""

import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from real_data import real

from common.data.images import CHANNELS
from common.data.labels import read_labels
from common.process import command_line
from common.process.main import run
from common.train.dataset import dihedral

SIDE = 384  # pixels of a window of the 512 px fields


def main():
    parser = command_line.Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder in the competition's layout")
    parser.add_argument(
        "--n-samples", type=command_line.positive, default=350, metavar="N", help="samples (default: 350)"
    )
    args = parser.parse_args()
    folder = real("kaggle_png")
    fields = sorted({path.with_name(path.stem.rsplit("_", 1)[0]) for path in folder.glob("*/*.png")})
    sets = [
        text
        for text in read_labels(real("labels") / "train.csv")["Target"]
        if set(map(int, text.split())) <= PATTERNS.keys()
    ]
    rng = np.random.default_rng(1)
    rows = []
    (args.out / "train").mkdir(parents=True, exist_ok=True)
    for k in range(args.n_samples):
        Id, target = f"half-real-{k:04d}", sets[rng.integers(len(sets))]
        planes = {
            channel: cv2.imread(f"{fields[k % len(fields)]}_{channel}.png", cv2.IMREAD_GRAYSCALE)
            for channel in CHANNELS
        }
        rows.append((Id, target))
        for channel, plane in window(draw(planes, target, rng), rng).items():
            cv2.imwrite(str(args.out / "train" / f"{Id}_{channel}.png"), plane)
    pd.DataFrame(rows, columns=["Id", "Target"]).to_csv(args.out / "train.csv", index=False)
    print(f"{args.n_samples} samples in {args.out}")


def window(planes: dict, rng) -> dict:
    """Cut the same random window out of all planes and rotate it."""
    top, left = (rng.integers(side - SIDE + 1) for side in planes["red"].shape)
    which = int(rng.integers(8))
    return {
        channel: np.ascontiguousarray(dihedral(plane[top : top + SIDE, left : left + SIDE], which))
        for channel, plane in planes.items()
    }


# --- drawing: (h, w) floats, about 0 to 1 -------------------------------------------------------------------


def blur(plane, sigma: float):
    return cv2.GaussianBlur(plane, (0, 0), sigma)


def stretched(plane):
    return plane / max(1e-6, np.quantile(plane, 0.995))


def texture(cell, sigma: float, rng):
    grain = blur(rng.standard_normal(cell.shape).astype(np.float32), sigma)
    return grain / grain.std()


def rim(mask, width: int, sigma: float):
    return np.clip(blur(mask, sigma) - blur(cv2.erode(mask, np.ones((width, width))), sigma), 0, 1)


# class -> drawing from the nuclei's mask, their softened mask, and the whole cells
PATTERNS = {
    0: lambda nuclei, soft, cell, rng: soft * (0.7 + 0.2 * texture(cell, 2, rng)),
    1: lambda nuclei, soft, cell, rng: rim(nuclei, 7, 1),
    2: lambda nuclei, soft, cell, rng: soft * np.clip(texture(cell, 4, rng) - 1.3, 0, 1) * 1.5,
    7: lambda nuclei, soft, cell, rng: (
        np.clip(blur(nuclei, 7) - soft, 0, 1) * np.clip(texture(cell, 3, rng) - 1, 0, 1) * 4
    ),
    21: lambda nuclei, soft, cell, rng: rim((cell > 0.3).astype(np.float32), 9, 1.5) + 0.15 * cell * (1 - soft),
    23: lambda nuclei, soft, cell, rng: cell * (1 - soft) * np.clip(0.5 * texture(cell, 1.2, rng) + 0.1, 0, 1),
    25: lambda nuclei, soft, cell, rng: cell * (1 - soft) * (0.6 + 0.15 * texture(cell, 1.5, rng)),
}


def draw(planes: dict, target: str, rng) -> dict:
    """Return the planes, slightly darker or brighter, with a green one drawn for the labels of `target`."""
    blue, red, yellow = (stretched(planes[channel].astype(np.float32)) for channel in ("blue", "red", "yellow"))
    nuclei = (blur(blue, 2) > 0.25).astype(np.float32)
    cell = np.clip(blur(np.maximum(red, yellow), 3) * 1.6, 0, 1)
    soft = blur(nuclei, 1)
    green = sum(PATTERNS[int(label)](nuclei, soft, cell, rng) * rng.uniform(0.4, 1) for label in target.split())
    green = np.clip(green, 0, None) * (0.75 + 0.25 * yellow) + 0.06 * cell * rng.uniform(0, 1.5)
    green = stretched(green) * rng.uniform(0.25, 1)
    green = green + rng.normal(0, 0.04, green.shape) * np.sqrt(np.clip(green, 0.02, None))
    light = rng.uniform(0.7, 1.2)
    return {
        channel: (255 * np.clip(green, 0, 1)).astype(np.uint8)
        if channel == "green"
        else np.clip(plane * light, 0, 255).astype(np.uint8)
        for channel, plane in planes.items()
    }


if __name__ == "__main__":
    run(main)
