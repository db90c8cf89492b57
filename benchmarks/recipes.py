"""Measure time and memory of each recipe's training step at its real crop, with a batch of 2, on this machine's CPU.

Each recipe runs in its own process: three steps of stage 04 (loss, hard sampler, optimizer) on random images.

example python benchmarks/recipes.py --recipes resnet50,gapnet_pl
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.process import command_line
from common.process.main import run
from common.recipes import RECIPES, get_recipe

BATCH, STEPS = 2, 3


def parse_args():
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--recipes",
        type=command_line.recipe_names,
        default=[name for name in RECIPES if not name.startswith("demo")],
        help="recipes to measure (default: the paper's)",
    )
    parser.add_argument("--one", help="measure one recipe in this process and print its JSON")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows = []
    print(f"{'recipe':16s} {'crop':>5s} {'parameters':>12s} {'s/step':>8s} {'GiB':>6s}")
    for name in args.recipes:
        result = subprocess.run([sys.executable, __file__, "--one", name], check=True, capture_output=True, text=True)
        rows.append(json.loads(result.stdout.splitlines()[-1]))
        print(
            "{recipe:16s} {crop:5d} {parameters:12,d} {seconds_per_step:8.2f} {peak_gib:6.2f}".format(**rows[-1]),
            flush=True,
        )
    print(json.dumps(rows))


def measure(name: str) -> dict:
    """Return the fastest of a few steps, and the growth of the process's peak memory since torch was loaded."""
    import numpy as np
    import torch

    from common.classes import N_CLASSES
    from common.train.dataset import ImageSet, Normalisation
    from common.train.fold_data import FoldData
    from common.train.hardware import HardwareOptions, choose_hardware
    from common.train.run import new_run
    from common.train.step import train_step

    recipe = get_recipe(name)
    before = peak_gib()
    rows = ImageSet(Path(), np.array(["a", "b"]), np.eye(BATCH, N_CLASSES, dtype=bool))
    data = FoldData(rows, rows, np.arange(N_CLASSES) + 1, Normalisation((0.1,) * 4, (0.1,) * 4))
    run = new_run(recipe, data, choose_hardware(HardwareOptions("cpu", "fp32", 0)), 0, 0)
    run.model.train()
    images = torch.randint(0, 256, (BATCH, 4, recipe.crop, recipe.crop), dtype=torch.uint8)
    seconds = []
    for step in range(STEPS):
        started = time.perf_counter()
        train_step(run, images, torch.from_numpy(rows.targets).float(), BATCH, recipe.hard_share, step)
        seconds.append(time.perf_counter() - started)
    return {
        "recipe": name,
        "crop": recipe.crop,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "seconds_per_step": round(min(seconds), 2),
        "peak_gib": round(peak_gib() - before, 2),
        "batch": BATCH,
    }


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    run(main)
