"""Measure what stage 05 costs beyond the network: seconds per image against the bare forward pass, eight views.

bare     the same network, precision, batches and views on normalised tensors already in memory
stage05  predict_logits of stage 05 from stored images: reading, normalising, rotating
Both run in one process, batch by batch in turn. The median of the rounds' ratios counts, after a warm-up round.

example python benchmarks/predict.py
The last line is a JSON object.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from in_turn import InTurn

from common.process import command_line
from common.process.main import run
from common.recipes import get_recipe

# name -> recipe, images
NETWORKS = {
    "tiny": (get_recipe("demo"), 256),
    "tiny+": (get_recipe("small_plus"), 256),
    "small": (get_recipe("demo", ["encoder=resnet18"]), 16),
    "large": (get_recipe("resnet50", ["size_divisor=4"]), 8),
}
WANTED = 1.03


def main():
    parser = command_line.Parser(__doc__)
    parser.add_argument("--repeats", type=command_line.positive, default=7, metavar="N", help="rounds (default: 7)")
    args = parser.parse_args()
    print(
        f"{'':8s} {'bare ms':>9s} {'stage 05 ms':>12s} {'ratio':>7s} {'95 %':>15s} "
        f"{'largest difference, batches of 1 and 32':>42s}"
    )
    figures = {}
    for name in NETWORKS:
        figures[name] = row = measure(name, args.repeats)
        print(
            f"{name:8s} {row['bare_ms']:9.3f} {row['stage_ms']:12.3f} {row['ratio']:7.3f} "
            f"{'[{low:.3f}, {high:.3f}]'.format(**row):>15s} {row['difference']:42.1e}",
            flush=True,
        )
    print(f"milliseconds per image under eight views; target: ratio at most {WANTED}")
    print(json.dumps(figures))


def measure(name: str, repeats: int) -> dict:
    import torch

    from common.data.images import write_planes
    from common.train.dataset import BATCH, ImageSet, loader, whole_batches
    from common.train.hardware import HardwareOptions, choose_hardware
    from common.train.networks import build_model
    from common.train.predict import Normalisation, predict_logits, views

    recipe, n = NETWORKS[name]
    rng = np.random.default_rng(0)
    hardware, looks = choose_hardware(HardwareOptions("cpu"), training=False), views("dihedral")
    normalise = Normalisation((0.1,) * 4, (0.1,) * 4)
    torch.manual_seed(0)
    model = build_model(recipe, 28).to(memory_format=torch.channels_last).eval()
    with tempfile.TemporaryDirectory() as folder:
        ids = np.array([f"s{i}" for i in range(n)])
        for Id in ids:
            write_planes(
                Path(folder) / f"{Id}.tif",
                rng.integers(0, 256, (4, recipe.size // 8, recipe.size // 8), dtype=np.uint8)
                .repeat(8, axis=1)
                .repeat(8, axis=2),
            )

        def images():
            return ImageSet(Path(folder), ids, np.zeros((n, 28), dtype=bool))

        stored = images()
        batches = [normalise(x, hardware.device) for x, _ in loader(stored, 0, False, whole_batches(stored, BATCH))]

        @torch.inference_mode()
        def bare(k):
            for look in looks:
                model(look(batches[k]))

        def stage(images):
            feed = in_turn(iter(loader(images, 0, False, whole_batches(images, BATCH))))
            predict_logits(model, normalise, images, hardware, looks, feed=feed)

        in_turn = InTurn(bare)
        figures = in_turn.measure(lambda: stage(images()), repeats, n)
        single, many = (
            predict_logits(model, normalise, images(), hardware, looks, size).sigmoid() for size in (1, BATCH)
        )
    return {**figures, "difference": float((single - many).abs().max())}


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    run(main)
