"""Measure the project's speed and memory on a GPU; prints each row as soon as it is measured.

steps    images per second and peak memory of each recipe's training step, on batches already in the GPU's memory, with
         deterministic and with fast kernels
stage04  steps of stage 04 from stored images against a bare loop (forward, binary cross-entropy, backward, step) on
         normalised tensors in the GPU's memory, and the share of time that stage 04 waits for batches
loader   training crops per second from loader processes, by their number and the kind of store
stalls   from the end of an epoch's last step to the start of the next epoch's first, without validation, and with a
         checkpoint
stage05  whole images per second under eight views, from stored images and bare
largest  the largest batch whose training step fits into --memory, and the batch that stage 01's check expects

It also runs on a CPU, to check that it works: python benchmarks/gpu.py --device cpu --small

example python benchmarks/gpu.py --recipes resnet50,senet
The last line is a JSON object.
"""

import gc
import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_step import bare_step, new_run

from common.process import command_line
from common.process.main import run
from common.recipes import RECIPES, Recipe, get_recipe

RATIO, WAITING = 1.03, 0.02  # targets: ratio of stage 04 to the bare loop, share of time spent waiting
SAMPLES = 16  # different stored images; epochs repeat them
WARM_UP = 3  # steps that are not counted
WORKERS = (1, 2, 4, 8, 16)
ENOUGH = 1.03  # between a batch that fits and one that does not


def parse_args():
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--recipes",
        type=command_line.recipe_names,
        metavar="A,B",
        help="recipes of `steps` and `largest` (default: one per network)",
    )
    parser.add_argument(
        "--fed", default="resnet50", metavar="RECIPE", help="recipe of the other parts (default: resnet50)"
    )
    parser.add_argument(
        "--parts", type=command_line.names, default=list(PARTS), metavar="A,B", help=f"default: {','.join(PARTS)}"
    )
    parser.add_argument(
        "--seconds",
        type=command_line.positive,
        default=3,
        metavar="S",
        help="approximate length of each measurement (default: 3)",
    )
    parser.add_argument(
        "--memory",
        type=command_line.positive,
        default=15,
        metavar="GB",
        help="memory that `largest` may use (default: 15)",
    )
    parser.add_argument("--small", action="store_true", help="small networks, images and batches")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: a GPU if available)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"unknown part {min(unknown)}; known: {', '.join(PARTS)}")
    if args.small:
        args.fed, args.recipes = "demo", args.recipes or ["demo", "gapnet_pl-quick"]
    first = {recipe.encoder: name for name, recipe in reversed(RECIPES.items()) if not name.startswith("demo")}
    args.recipes = args.recipes or sorted(first.values(), key=list(RECIPES).index)
    return args


def main():
    args = parse_args()
    from common.train.hardware import HardwareOptions, choose_hardware

    options = HardwareOptions(args.device, args.precision)
    with tempfile.TemporaryDirectory() as folder:
        bench = SimpleNamespace(
            args=args,
            seconds=args.seconds,
            folder=Path(folder),
            drawn={},
            fed=get_recipe(args.fed, ["finder=off"]),
            training=choose_hardware(options),
            predicting=choose_hardware(options, training=False),
        )
        print(bench.training, flush=True)
        figures, started = {"hardware": bench.training.record(), "fed": args.fed}, time.monotonic()
        for part in args.parts:
            print(f"\n{part}  ({time.monotonic() - started:.0f} s so far)", flush=True)
            figures[part] = PARTS[part](bench)
            tidy(bench.training)
    print(json.dumps(figures))


# --- the parts ---------------------------------------------------------------------------------------------


def steps(bench) -> dict:
    rows = {}
    print(f"{'recipe':16s} {'crop':>5s} {'batch':>6s} {'at once':>8s} {'kernels':>14s} {'images/s':>9s} {'GB':>6s}")
    for name in bench.args.recipes:
        recipe = get_recipe(name)
        for kernels in ("deterministic", "fast"):
            row = step_speed(recipe, replace(bench.training, fast=kernels == "fast"), bench.seconds)
            print(
                f"{name:16s} {recipe.crop:5d} {recipe.batch_size:6d} {row['at_once']:8d} {kernels:>14s} "
                f"{row['images_per_s']:9.1f} {row['peak_gb']:6.2f}",
                flush=True,
            )
            rows[f"{name}, {kernels}"] = row
            tidy(bench.training)
    return rows


def step_speed(recipe: Recipe, hardware, seconds: float) -> dict:
    from common.train.step import train_step

    run, n = new_run(recipe, no_images(), hardware), recipe.batch_size
    images, targets = random_batch(n, recipe.crop, hardware.device)
    each = seconds_of(lambda: train_step(run, images, targets, n, recipe.hard_share, 0), seconds, hardware)
    return {
        "images_per_s": round(n / each, 1),
        "at_once": run.micro_batch or n,
        "peak_gb": round(peak_bytes(hardware) / 1e9, 2),
    }


def stage04(bench) -> dict:
    """Run bare steps, an epoch of stage 04 without counting its first steps, and bare steps again."""
    from common.train.loop import all_batches, train_epoch

    recipe, hardware = replace(bench.fed, cycle_epochs=3, evaluate_epochs=3), bench.training
    run = new_run(recipe, no_images(), hardware)
    images, targets = random_batch(recipe.batch_size, recipe.crop, hardware.device)
    inputs = run.normalise(images, hardware.device).contiguous(memory_format=hardware.memory_format)
    bare = [seconds_of(lambda: bare_step(run, inputs, targets), bench.seconds, hardware)]
    skipped, counted = 2 * hardware.workers + WARM_UP, max(10, round(2 * bench.seconds / bare[0]))
    data = stored_images(bench, recipe, (skipped + counted) * recipe.batch_size)
    run = new_run(recipe, data, hardware)
    clock = SimpleNamespace(started=0.0, waited=0.0)

    def watched(feed):
        for k in range(skipped + counted):
            if k == skipped:
                wait_for(hardware)
                clock.started, clock.waited = time.perf_counter(), 0.0
            asked = time.perf_counter()
            batch = next(feed)
            clock.waited += time.perf_counter() - asked
            yield batch

    run.epoch = 1  # after the hard sampler's warm-up
    train_epoch(run, data, watched(all_batches(run, data)), "stage04", lambda: None)
    wait_for(hardware)
    stage = time.perf_counter() - clock.started
    bare.append(seconds_of(lambda: bare_step(run, inputs, targets), bench.seconds, hardware))
    row = {
        "bare_images_per_s": round(recipe.batch_size / np.mean(bare), 1),
        "steps": counted,
        "images_per_s": round(counted * recipe.batch_size / stage, 1),
        "ratio": round(stage / counted / np.mean(bare), 3),
        "waiting": round(clock.waited / stage, 4),
    }
    print(
        "bare {bare_images_per_s} images/s, stage 04 {images_per_s}: ratio {ratio} (target: {0}), waiting for data "
        "{waiting:.1%} (target: {1:.0%}), {steps} steps".format(RATIO, WAITING, **row),
        flush=True,
    )
    return row


def loader_alone(bench) -> dict:
    from joblib import cpu_count

    from common.train.dataset import EpochBatches, loader

    recipe, rows = bench.fed, {}
    numbers = [workers for workers in WORKERS if workers <= cpu_count()]
    print(
        f"{cpu_count()} cores; crops per second with this many loader processes\n{'store':10s}"
        + "".join(f"{workers:>9d}" for workers in numbers)
    )
    for store in STORES:
        data = stored_images(bench, recipe, 64 * SAMPLES, store)
        print(f"{store:10s}", end="", flush=True)
        for workers in numbers:
            keys = (batch for epoch in count() for batch in EpochBatches(64 * SAMPLES, recipe.batch_size, 0, epoch))
            feed, batches = iter(loader(data.train, workers, bench.training.is_gpu, keys)), 0
            for _ in islice(feed, 2 * workers):  # made before they are requested
                pass
            started = time.perf_counter()
            while batches < 2 or time.perf_counter() - started < bench.seconds:
                next(feed)
                batches += 1
            rows[f"{store}, {workers}"] = round(batches * recipe.batch_size / (time.perf_counter() - started), 1)
            print(f"{rows[f'{store}, {workers}']:9.1f}", end="", flush=True)
            del feed
        print()
    return rows


def stalls(bench) -> dict:
    """Run a training of a few epochs without checkpoints, and one with a checkpoint after each epoch."""
    rows = {what: epoch_gap(bench, seconds) for what, seconds in (("epoch", 10**9), ("epoch and checkpoint", 0))}
    print(
        f"seconds without a step: {rows['epoch']:.3f} between epochs, {rows['epoch and checkpoint']:.3f} with a "
        "checkpoint",
        flush=True,
    )
    return rows


def epoch_gap(bench, epoch_seconds: float) -> float:
    from common.artifacts.stage import Stage
    from common.train import loop
    from common.train.jobs import Job

    recipe, hardware = replace(bench.fed, cycle_epochs=4, max_cycles=1, evaluate_epochs=4), bench.training
    real, ends, gaps = loop.train_step, [], []

    def watched(run, *arguments):
        if run.step == 0 and ends:
            gaps.append(time.perf_counter() - ends[-1])
        result = real(run, *arguments)
        if run.step == n_steps - 1:
            wait_for(hardware)
            ends.append(time.perf_counter())
        return result

    n_steps = 2 * hardware.workers + 10  # more than are ready before they are requested
    data = stored_images(bench, recipe, n_steps * recipe.batch_size)
    run = new_run(recipe, data, hardware)
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    job = Job(folder, "stalls", recipe, 0, Stage("04_train", folder / "best.pt", {}, {}))
    with (
        patch.object(loop, "train_step", watched),
        patch.object(loop, "EPOCH_SECONDS", epoch_seconds),
        redirect_stdout(StringIO()),
    ):
        loop.train_fold(run, job, data)
    return round(float(np.median(gaps)), 4)


def stage05(bench) -> dict:
    import torch

    from common.train.dataset import BATCH, Normalisation, loader, on_device, whole_batches
    from common.train.hardware import set_kernels
    from common.train.networks import build_model
    from common.train.predict import predict_logits, views

    recipe, hardware, looks = bench.fed, bench.predicting, views("dihedral")
    set_kernels(hardware)
    model = build_model(recipe, 28).to(hardware.device, memory_format=torch.channels_last).eval()
    normalise = Normalisation((0.1,) * 4, (0.1,) * 4)
    inputs = normalise(random_batch(BATCH, recipe.size, hardware.device)[0], hardware.device)

    @torch.inference_mode()
    def bare():
        with hardware.casting():
            for look in looks:
                model(look(inputs))

    each = [seconds_of(bare, bench.seconds, hardware)]
    n = max(3, round(2 * bench.seconds / each[0]))
    images = stored_images(bench, recipe, n * BATCH).whole
    parts, skipped = whole_batches(images, BATCH), 2 * hardware.workers
    feed = on_device(
        loader(images, hardware.workers, hardware.is_gpu, (parts * (skipped + 1))[: n + skipped]), hardware.device
    )
    for _ in islice(feed, skipped):
        pass
    started = time.perf_counter()
    predict_logits(model, normalise, images, hardware, looks, feed=feed)
    stage = time.perf_counter() - started
    each.append(seconds_of(bare, bench.seconds, hardware))
    row = {
        "bare_images_per_s": round(BATCH / np.mean(each), 1),
        "images_per_s": round(n * BATCH / stage, 1),
        "ratio": round(stage / n / np.mean(each), 3),
    }
    print(
        "bare {bare_images_per_s} images/s under 8 views, stage 05 {images_per_s}: ratio {ratio}".format(**row),
        flush=True,
    )
    return row


def largest(bench) -> dict:
    from common.check import costs

    rows, free = {}, bench.args.memory * 10**9
    print(f"{'recipe':16s} {'expected':>9s} {'fits':>6s} {'ratio':>6s}   images of one batch in {free / 1e9:.0f} GB")
    for name in bench.args.recipes:
        recipe = get_recipe(name)
        with patch.object(costs, "SECONDS", bench.seconds / 2), patch.object(costs, "ENOUGH", bench.seconds / 10):
            expected = costs.batch_that_fits(costs.measure_here(recipe), free)
        tidy(bench.training)
        fits = (
            largest_batch(recipe, bench.training, free - costs.LIBRARIES, expected) if bench.training.is_gpu else None
        )
        rows[name] = {"expected": expected, "fits": fits, "ratio": fits and round(expected / fits, 2)}
        print(f"{name:16s} {expected:9d} {fits or '-':>6} {rows[name]['ratio'] or '-':>6}", flush=True)
        tidy(bench.training)
    return rows


def largest_batch(recipe: Recipe, hardware, room: int, guess: int) -> int:
    """Return the largest batch whose training step fits into `room` bytes of GPU memory, by bisection from `guess`."""
    import torch

    run = new_run(recipe, no_images(), hardware)
    low, high, n = 1, None, max(2, guess)
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, room / torch.cuda.get_device_properties(hardware.device).total_memory)
    )
    try:
        while high is None or high > max(low + 1, low * ENOUGH):
            if step_fits(run, n):
                low = n
            else:
                high = n
            tidy(hardware)
            n = (low + high) // 2 if high else 2 * n
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return low


def step_fits(run, n: int) -> bool:
    from common.errors import is_out_of_memory
    from common.train.step import Attempt

    try:
        images, targets = random_batch(n, run.recipe.crop, run.hardware.device)
        following = images.clone()  # is loaded while a step runs
        attempt = Attempt(run, images, targets.to(run.hardware.device), n, 0)
        attempt.backward(attempt.ranked() * 0 + 1 / n)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return len(following) == n
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False


PARTS = {
    "steps": steps,
    "stage04": stage04,
    "loader": loader_alone,
    "stalls": stalls,
    "stage05": stage05,
    "largest": largest,
}


# --- shared ------------------------------------------------------------------------------------------------


def wait_for(hardware) -> None:
    if hardware.is_gpu:
        import torch

        torch.cuda.synchronize(hardware.device)


def tidy(hardware) -> None:
    """Free unused memory and reset its peak."""
    gc.collect()
    if hardware.is_gpu:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(hardware.device)


def peak_bytes(hardware) -> int:
    """Return the peak bytes of tensors since `tidy`; 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated(hardware.device) if hardware.is_gpu else 0


def seconds_of(work, seconds: float, hardware) -> float:
    """Return the seconds per `work()`, repeated for about `seconds`; waits for the GPU only at both ends."""
    for _ in range(WARM_UP):
        work()
    wait_for(hardware)
    started, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - started < seconds:
        work()
        done += 1
    wait_for(hardware)
    return (time.perf_counter() - started) / done


def random_batch(n: int, size: int, device):
    """Return n noise images, (n, 4, size, size) uint8, channels last, and targets (n, 28), on the device."""
    import torch

    images = torch.randint(0, 256, (n, size, size, 4), dtype=torch.uint8, device=device)
    return images.permute(0, 3, 1, 2), (torch.rand(n, 28, device=device) < 0.06).float()


def no_images():
    """Return what a run needs to know about its data when it gets batches of noise."""
    from common.train.dataset import Normalisation

    return SimpleNamespace(
        counts=np.arange(28) + 1, train=range(2), normalisation=Normalisation((0.1,) * 4, (0.1,) * 4)
    )


def stored_images(bench, recipe: Recipe, n: int, store: str = "zstd"):
    """Return n rows of a few drawn samples as the data of a fold; `whole` has all of them as whole images.

    The first call stores the samples.
    """
    from common.data.images import CHANNELS, checksum
    from common.demo.drawing import draw_sample
    from common.train.dataset import ImageSet, Normalisation

    if recipe.size not in bench.drawn:
        planes = (draw_sample(np.random.default_rng(k), (k % 28, 25), recipe.size) for k in range(SAMPLES))
        bench.drawn[recipe.size] = [np.stack([sample[channel] for channel in CHANNELS]) for sample in planes]
    folder, names = bench.folder / store / str(recipe.size), [f"s{k}" for k in range(SAMPLES)]
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for name, planes in zip(names, bench.drawn[recipe.size], strict=True):
            STORES[store](folder / f"{name}.tif", planes)
    rows = np.arange(n) % SAMPLES
    targets = np.random.default_rng(0).random((SAMPLES, 28)) < 0.06
    crcs = {name: checksum(planes) for name, planes in zip(names, bench.drawn[recipe.size], strict=True)}
    train = ImageSet(
        folder, np.array(names)[rows], targets[rows], recipe.crop, crcs=crcs, standardised=recipe.standardised
    )
    whole = replace(train, crop=None)
    valid = replace(whole, ids=whole.ids[:SAMPLES], targets=whole.targets[:SAMPLES])
    return SimpleNamespace(
        train=train,
        whole=whole,
        valid=valid,
        counts=targets.sum(axis=0) + 1,
        normalisation=Normalisation((0.1,) * 4, (0.1,) * 4),
    )


def write_store(path: Path, planes: np.ndarray, raw: bool) -> None:
    from common.data import images

    with patch.object(images, "PLAIN_SIDE", images.MAX_SIDE if raw else images.PLAIN_SIDE):
        images.write_planes(path, planes)


STORES = {"zstd": partial(write_store, raw=False), "raw": partial(write_store, raw=True)}


if __name__ == "__main__":
    run(main)
