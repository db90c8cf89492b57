"""Measure what stage 04 costs beyond the network: seconds per sample against a bare loop, waiting for data, memory.

bare     the same network, optimizer, precision and batches with tensors already in memory: forward, binary
         cross-entropy, backward, step
stage04  an epoch of stage 04 from stored images: reading, cropping, rotating, normalising, E-loss, hard sampler,
         telemetry
Both run in one process, batch by batch in turn: if the machine changes its speed, it affects both. The median of the
epochs' ratios counts, with its interval, after a warm-up epoch. Waiting is the share of stage 04's time spent waiting
for the next batch. Memory is that of a process that runs only one of them.

With --settings it measures the effect of precision, memory format and torch.compile on this machine: epochs of stage 04
in turn, the median of the ratios to 32 bit, channels last, not compiled; and the extra cost of the first epoch.

example python benchmarks/train_step.py
The last line is a JSON object.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from in_turn import InTurn, timed

from common.process import command_line
from common.process.main import run
from common.recipes import get_recipe

# name -> recipe, samples per epoch: networks that cost two, twenty and fifty milliseconds per sample. tiny is `demo`
# unchanged, tiny+ our own training of its network, small is `demo` with ResNet-18 instead.
NETWORKS = {
    "tiny": (get_recipe("demo", ["finder=off"]), 512),
    "tiny+": (get_recipe("small_plus", ["finder=off"]), 512),
    "small": (get_recipe("demo", ["encoder=resnet18", "finder=off"]), 256),
    "large": (get_recipe("resnet50", ["size_divisor=4", "batch_size=16", "finder=off"]), 64),
}
WANTED = 1.03
SETTINGS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "contiguous": {"precision": "fp32", "memory_format": "contiguous"},
    "compile": {"precision": "fp32", "compiled": True},
}


def parse_args():
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--repeats", type=command_line.positive, default=15, metavar="N", help="epochs of each (default: 15)"
    )
    parser.add_argument(
        "--settings", action="store_true", help="compare settings of stage 04 instead of stage 04 and a bare loop"
    )
    parser.add_argument(
        "--one", nargs=2, metavar=("NETWORK", "WHAT"), help="run in this process: both, bare, stage04 or settings"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    if args.one:
        return print(json.dumps(measure(*args.one, args.repeats)))
    if args.settings:
        return compare_settings(args.repeats)
    figures = {}
    print(
        f"{'':8s} {'bare ms':>9s} {'stage 04 ms':>12s} {'ratio':>7s} {'95 %':>15s} {'waiting':>8s} {'bare MiB':>9s} "
        f"{'stage 04 MiB':>13s}"
    )
    for name in NETWORKS:
        both, bare, ours = (in_a_process(name, what, args.repeats) for what in ("both", "bare", "stage04"))
        figures[name] = {**both, "bare_mib": bare["mib"], "stage04_mib": ours["mib"]}
        print(
            f"{name:8s} {both['bare_ms']:9.3f} {both['stage_ms']:12.3f} {both['ratio']:7.3f} "
            f"{'[{low:.3f}, {high:.3f}]'.format(**both):>15s} {both['waiting']:8.1%} "
            f"{bare['mib']:9d} {ours['mib']:13d}",
            flush=True,
        )
    print(f"milliseconds per sample; target: ratio at most {WANTED}, waiting at most 2 %")
    print(json.dumps(figures))


def compare_settings(repeats: int) -> None:
    figures = {}
    for name in NETWORKS:
        figures[name] = in_a_process(name, "settings", repeats)
        for setting, row in figures[name].items():
            print(
                f"{name:8s} {setting:12s} {row['ms']:9.3f} ms per sample, ratio {row['ratio']:.3f}, first epoch "
                f"{row['first_s']:+.1f} s",
                flush=True,
            )
    print(json.dumps(figures))


def in_a_process(name, what, repeats) -> dict:
    command = [sys.executable, __file__, "--one", name, what, "--repeats", str(repeats)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(name: str, what: str, repeats: int) -> dict:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from common.train.dataset import EpochBatches, loader
    from common.train.hardware import HardwareOptions, choose_hardware

    recipe, n = NETWORKS[name]
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        redirect_stderr(nowhere),
    ):  # no progress bars
        data = drawn_data(Path(folder), recipe, n)
        hardware = choose_hardware(HardwareOptions("cpu"))
        if what == "settings":
            return measure_settings(recipe, n, data, repeats)
        run = new_run(recipe, data, hardware)
        batches = []
        if what != "stage04":
            batches = [
                (run.normalise(x, hardware.device), y)
                for x, y in loader(data.train, 0, False, EpochBatches(n, recipe.batch_size, 0, 0))
            ]
            data.train.cache.clear()
        if what == "both":
            in_turn = InTurn(lambda k: bare_step(run, *batches[k]))
            return in_turn.measure(lambda: epoch(run, data, in_turn), repeats, n)
        for _ in range(repeats + 1):
            if what == "stage04":
                epoch(run, data)
            for x, y in batches:
                bare_step(run, x, y)
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def measure_settings(recipe, n: int, data, repeats: int) -> dict:
    from common.train.hardware import HardwareOptions, choose_hardware

    runs = {
        setting: new_run(recipe, data, choose_hardware(HardwareOptions("cpu", **flags)))
        for setting, flags in SETTINGS.items()
    }
    seconds = [[timed(lambda run=run: epoch(run, data)) for run in runs.values()] for _ in range(repeats + 1)]
    first, later = np.array(seconds[0]), np.array(seconds[1:])
    ratios = np.median(later / later[:, :1], axis=0)
    return {
        setting: {
            "ms": round(1000 * float(np.median(later[:, k])) / n, 3),
            "ratio": round(float(ratios[k]), 3),
            "first_s": round(float(first[k] - np.median(later[:, k])), 1),
        }
        for k, setting in enumerate(runs)
    }


def drawn_data(folder: Path, recipe, n: int):
    """Write n images of noise blocks, and return them as the data of a fold."""
    from common.data.images import write_planes
    from common.train.dataset import ImageSet, Normalisation
    from common.train.fold_data import FoldData

    rng = np.random.default_rng(0)
    targets = rng.random((n, 28)) < 0.06
    ids = np.array([f"s{i}" for i in range(n)])
    for Id in ids:
        write_planes(
            folder / f"{Id}.tif",
            rng.integers(0, 256, (4, recipe.size // 8, recipe.size // 8), dtype=np.uint8)
            .repeat(8, axis=1)
            .repeat(8, axis=2),
        )
    images = ImageSet(folder, ids, targets, recipe.crop, standardised=recipe.standardised)
    return FoldData(images, replace(images, crop=None), targets.sum(axis=0), Normalisation((0.1,) * 4, (0.1,) * 4))


def new_run(recipe, data, hardware):
    from common.train.run import new_run as begin

    run = begin(recipe, data, hardware, 0, 0)
    for group in run.optimizer.param_groups:
        group["lr"] = group["top_lr"] = 1e-4  # small, so that training on noise does not diverge
    run.model.train()
    return run


def epoch(run, data, in_turn=lambda feed: feed) -> None:
    """Run an epoch of stage 04, after the hard sampler's warm-up."""
    from common.train import loop

    run.epoch, run.step = 1, 0
    loop.train_epoch(run, data, in_turn(loop.all_batches(run, data)), "benchmark", lambda: None)


def bare_step(run, x, y) -> None:
    import torch

    run.optimizer.zero_grad(set_to_none=True)
    with run.hardware.casting():
        logits = run.model(x)
    torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), y).backward()
    run.optimizer.step()


if __name__ == "__main__":
    run(main)
