"""Measure 10_predict.py: its speed against the bare network, windows of larger fields, and missing channels.

speed     reading, scaling and cutting new images, and all networks under eight views, against the bare forward passes;
          both in one process, batch by batch in turn; the median of the rounds' ratios counts, after a warm-up round
windows   macro F1 on drawn fields of 1.5 to 3 times the size of a training image each way, by how windows are combined;
          all cells show the labels, or only those of one tile in six
missing   macro F1 out of fold without a channel, by how it is filled; and how many samples keep their labels
borders   macro F1 out of fold of the middle quarter of each image, by what is put around it
unlike    share of demo test images, changed in several ways, that are flagged; and of real ones in HPA_REAL_DATA

example python benchmarks/new_images.py speed
        python benchmarks/new_images.py windows --work work
        python benchmarks/new_images.py missing --work work
        HPA_REAL_DATA=real python benchmarks/new_images.py unlike --work work --data data
"""

import os
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from in_turn import InTurn

from common.classes import N_CLASSES
from common.process import command_line
from common.process.main import run
from common.recipes import get_recipe

NETWORKS = {  # name -> recipe, images
    "tiny": (get_recipe("demo"), 128),
    "small": (get_recipe("demo", ["encoder=resnet18"]), 32),
    "large": (get_recipe("resnet50", ["size_divisor=4"]), 8),
}
TILE = 256  # pixels of a drawn field
N_FIELDS = 150


def main():
    parser = command_line.Parser(__doc__)
    parser.add_argument("what", choices=("speed", "windows", "missing", "borders", "unlike"))
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="the demo data")
    parser.add_argument("--work", type=Path, default=Path("work"), metavar="DIR", help="trained on the demo data")
    parser.add_argument("--repeats", type=command_line.positive, default=7, metavar="N", help="rounds (default: 7)")
    args = parser.parse_args()
    measure = {
        "speed": lambda: speed(args.repeats),
        "windows": lambda: windows(args.work),
        "missing": lambda: missing(args.work),
        "borders": lambda: borders(args.work),
        "unlike": lambda: unlike(args.work, args.data / "test_full_size"),
    }
    measure[args.what]()


# --- speed -------------------------------------------------------------------------------------------------


def speed(repeats: int) -> None:
    print(f"{'':8s} {'bare ms':>9s} {'10_predict ms':>14s} {'ratio':>7s} {'95 %':>15s} {'waiting':>8s}")
    for name in NETWORKS:
        row = measure_speed(name, repeats)
        print(
            f"{name:8s} {row['bare_ms']:9.2f} {row['stage_ms']:14.2f} {row['ratio']:7.3f} "
            f"{'[{low:.3f}, {high:.3f}]'.format(**row):>15s} {row['waiting']:8.1%}",
            flush=True,
        )
    print("milliseconds per image under eight views; target: ratio at most 1.05")


def measure_speed(name: str, repeats: int) -> dict:
    """Predict PNG files of twice the network's size, one network, eight views."""
    import torch

    from common.predict import run as new_images
    from common.predict.batches import NewImages, kind_of, load_batches, plan_batches
    from common.predict.inputs import InputOptions, check, list_images
    from common.predict.model import Member, Model
    from common.train.dataset import Normalisation
    from common.train.hardware import HardwareOptions, choose_hardware
    from common.train.networks import build_model
    from common.train.predict import views

    recipe, n = NETWORKS[name]
    hardware, normalise = choose_hardware(HardwareOptions("cpu"), training=False), Normalisation((0.1,) * 4, (0.1,) * 4)
    torch.manual_seed(0)
    network = build_model(recipe, N_CLASSES).to(memory_format=torch.channels_last).eval()
    member = Member(name, 0, recipe, 1.0, lambda hardware: (network, normalise))
    model, settings = Model(name, Path(), (member,)), new_images.Settings()
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder), n, 2 * recipe.size)
        images = check(list_images(Path(folder), InputOptions()), InputOptions(), 1)
        networks = new_images.load_networks(model, settings, hardware)
        batches = plan_batches(images, model, 8)
        dataset = NewImages(images, (kind_of(member),), model.pixel_size, settings.levels)
        pixels = [batch.windows[kind_of(member)][0].images for batch in load_batches(dataset, batches, hardware)]
        tensors = [normalise(x, hardware.device) for x in pixels]

        @torch.inference_mode()
        def bare(k):
            for look in views("dihedral"):
                network(look(tensors[k]))

        def stage():
            for batch in islice(in_turn(load_batches(dataset, batches, hardware)), len(batches)):
                some = [images[item.row] for item in batch.items]
                arrays = new_images.predict_batch(networks, batch, some, model, settings, 8)
                new_images.save_part(Path(folder) / "parts", "key", some, arrays)

        in_turn = InTurn(bare)
        return in_turn.measure(stage, repeats, n)


def write_noise(folder: Path, n: int, side: int) -> None:
    """Write n images of four PNG channels."""
    import cv2

    rng = np.random.default_rng(0)
    for k in range(n):
        for colour in ("red", "green", "blue", "yellow"):
            coarse = rng.integers(0, 256, (side // 8, side // 8), dtype=np.uint8)
            cv2.imwrite(str(folder / f"s{k}_{colour}.png"), coarse.repeat(8, axis=0).repeat(8, axis=1))


# --- windows -----------------------------------------------------------------------------------------------


def windows(work: Path) -> None:
    print(f"{'labels in':12s} {'windows':8s} {'macro F1':>9s} {'labels per field':>17s}")
    for rare in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            targets = draw_fields(Path(folder), rare)
            for how in ("mean", "max"):
                score, labels = predict_fields(Path(folder), work, how, targets)
                print(f"{'one in six' if rare else 'all tiles':12s} {how:8s} {score:9.3f} {labels:17.2f}", flush=True)
    print(f"{N_FIELDS} drawn fields; labels per field in truth: {targets.sum(axis=1).mean():.2f}")


def draw_fields(folder: Path, rare: bool) -> np.ndarray:
    """Draw fields of 2 x 3 tiles, cut at random; return their labels.

    rare : whether only one tile shows all labels, and the others the most common of them
    """
    import cv2

    from common.data.images import CHANNELS
    from common.demo.data import REAL_COUNTS, draw_labels
    from common.demo.drawing import draw_sample

    rng = np.random.default_rng(7)
    targets = np.zeros((N_FIELDS, N_CLASSES), bool)
    for k, labels in enumerate(draw_labels(rng, N_FIELDS)):
        targets[k, list(labels)] = True
        common = (max(labels, key=lambda label: REAL_COUNTS[label]),)
        shown = [labels if not rare or tile == k % 6 else common for tile in range(6)]
        tiles = [draw_sample(rng, some, TILE) for some in shown]
        top, left = (0, 0) if rare else rng.integers(0, TILE // 2, 2)
        for colour in CHANNELS:
            rows = [np.hstack([tile[colour] for tile in tiles[3 * r : 3 * r + 3]]) for r in range(2)]
            cv2.imwrite(str(folder / f"{k:04d}_{colour}.png"), np.vstack(rows)[top:, left:])
    return targets


def predict_fields(folder: Path, work: Path, how: str, targets: np.ndarray) -> tuple[float, float]:
    """Return macro F1 and the number of labels per field with one way of combining windows."""
    import subprocess

    from common.score.metrics import macro_f1

    out = folder / how
    flags = ["--images", folder, "--model", work, "--out", out, "--windows", how, "--tta", "none"]
    script = Path(__file__).resolve().parent.parent / "10_predict.py"
    size = str(0.08 * 2048 / TILE)
    subprocess.run(
        [sys.executable, str(script), *map(str, flags), "--pixel-size", size], check=True, capture_output=True
    )
    found = np.load(out / "predictions.npz")["predicted"]
    return macro_f1(targets, found), float(found.sum(axis=1).mean())


# --- missing channels --------------------------------------------------------------------------------------


def missing(work: Path) -> None:
    from common.artifacts.layout import Layout
    from common.data.labels import parse_targets
    from common.data.sources import CHANNELS
    from common.predict.batches import FILLINGS, fill_missing
    from common.predict.model import open_model
    from common.score.metrics import macro_f1

    model, folds = open_model(work), Layout(work).read_folds()
    folds = folds[folds["fold"] >= 0].reset_index(drop=True)
    targets = parse_targets(folds["Target"])
    whole = out_of_fold(work, model, folds, lambda images, means: images)
    print(f"macro F1 {macro_f1(targets, model.decide(whole)):.3f} with all channels, {len(folds)} samples, one view")
    print(f"{'missing':8s} {'filled with':16s} {'macro F1':>9s} {'probabilities moved':>20s} {'same labels':>12s}")
    for channel in CHANNELS:
        for name in FILLINGS:
            if name != f"copy of {channel}":

                def fill(images, means, channel=channel, name=name):
                    fill_missing(images, (channel,), {channel: name}, means)
                    return images

                probs = out_of_fold(work, model, folds, fill)
                same = (model.decide(probs) == model.decide(whole)).all(axis=1).mean()
                score, moved = macro_f1(targets, model.decide(probs)), np.abs(probs - whole).mean()
                print(f"{channel:8s} {name:16s} {score:9.3f} {moved:20.3f} {same:12.1%}", flush=True)


def out_of_fold(work, model, folds, change) -> np.ndarray:
    """Return each sample's probabilities by the networks that were not trained on it, (n, 28), one view.

    change : function of images (n, 4, h, w) uint8 and the mean grey levels, that returns the images to predict
    """
    import torch

    from common.predict.run import grey_levels
    from common.train.fold_data import image_set
    from common.train.hardware import HardwareOptions, choose_hardware

    hardware = choose_hardware(HardwareOptions("cpu"), training=False)
    probs = np.zeros((len(model.members), len(folds), N_CLASSES), np.float32)
    for k, member in enumerate(model.members):
        network, normalise = member.load(hardware)
        network.eval()
        rows = np.flatnonzero((folds["fold"] == member.fold).to_numpy())
        images = image_set(work, member.recipe, folds.iloc[rows])
        for first in range(0, len(rows), 32):
            part = range(first, min(first + 32, len(rows)))
            pixels = torch.from_numpy(np.stack([images[i][0] for i in part]))
            pixels = change(pixels, grey_levels(normalise))
            with torch.inference_mode():
                probs[k, rows[part]] = network(normalise(pixels, hardware.device)).sigmoid().numpy()
    runs = [[k for k, member in enumerate(model.members) if member.name == name] for name in model.names]
    return np.mean([probs[some].sum(axis=0) for some in runs], axis=0)


# --- borders, unlike ---------------------------------------------------------------------------------------


def borders(work: Path) -> None:
    import torch

    from common.artifacts.layout import Layout
    from common.data.labels import parse_targets
    from common.predict.model import open_model
    from common.score.metrics import macro_f1

    def around(images, mode):
        quarter = images.shape[-1] // 4
        middle = images[..., quarter:-quarter, quarter:-quarter].contiguous(memory_format=torch.channels_last)
        if mode == "none":
            return middle
        padded = torch.nn.functional.pad(middle.float(), (quarter,) * 4, mode="reflect" if mode == "mirrored" else mode)
        return padded.to(torch.uint8).contiguous(memory_format=torch.channels_last)

    model, folds = open_model(work), Layout(work).read_folds()
    folds = folds[folds["fold"] >= 0].reset_index(drop=True)
    targets = parse_targets(folds["Target"])
    for mode in ("none", "constant", "mirrored"):
        probs = out_of_fold(work, model, folds, lambda images, means, mode=mode: around(images, mode))
        print(f"{mode:10s} {macro_f1(targets, model.decide(probs)):.3f}", flush=True)


NOISE = np.random.default_rng(0)
CHANGES = {  # functions of planes (4, side, side) uint8
    "none": lambda x: x,
    "noise": lambda x: NOISE.integers(0, 256, x.shape, dtype=np.uint8),
    "inverted": lambda x: 255 - x,
    "green black": lambda x: x * np.array([1, 0, 1, 1], np.uint8)[:, None, None],
    "wrong order": lambda x: x[[1, 2, 3, 0]],
    "red, yellow exchanged": lambda x: x[[3, 1, 2, 0]],
    "blurred": lambda x: np.stack([blurred(plane) for plane in x]),
    "twice as large": lambda x: x[:, : x.shape[1] // 2, : x.shape[2] // 2],
    "half as bright": lambda x: x // 2,
    "a quarter as bright": lambda x: x // 4,
}


def blurred(plane: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.GaussianBlur(plane, (0, 0), 4)


def unlike(work: Path, folder: Path, n: int = 60) -> None:
    import cv2
    import tifffile

    from common.data.images import CHANNELS

    ids = sorted(path.name.removesuffix("_red.tif") for path in folder.glob("*_red.tif"))[:n]
    print(f"{'change':22s} {'unlike':>7s} {'darker or brighter':>19s}")
    for name, change in CHANGES.items():
        with tempfile.TemporaryDirectory() as place:
            for Id in ids:
                planes = change(np.stack([tifffile.imread(folder / f"{Id}_{c}.tif") for c in CHANNELS]))
                for channel, plane in zip(CHANNELS, planes, strict=True):
                    cv2.imwrite(f"{place}/{Id}_{channel}.png", plane)
            print(f"{name:22s} " + flagged(Path(place), work), flush=True)
    if "HPA_REAL_DATA" in os.environ:
        print(f"{'real images':22s} " + flagged(Path(os.environ["HPA_REAL_DATA"]) / "kaggle_png" / "train", work))


def flagged(images: Path, work: Path) -> str:
    """Return the shares of images that are flagged as unlike the training data, and as darker or brighter."""
    import subprocess

    import pandas as pd

    script = Path(__file__).resolve().parent.parent / "10_predict.py"
    with tempfile.TemporaryDirectory() as out:
        flags = ["--images", images, "--model", work, "--out", out, "--tta", "none"]
        subprocess.run([sys.executable, str(script), *map(str, flags)], check=True, capture_output=True)
        texts = pd.read_csv(Path(out) / "predictions.csv", keep_default_na=False)["flags"]
    return f"{texts.str.contains('unlike').mean():7.0%} {texts.str.contains('darker|brighter').mean():19.0%}"


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    run(main)
