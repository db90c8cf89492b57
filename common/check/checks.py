"""Look at everything before days are spent: what is fine, what will fail and how to mend it, and what a run will take.

Nothing but the standard library is imported until a check needs it, so that missing packages can be told like the rest.
Each check yields lines; writes nothing but temporary files, which it takes away again.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from common.errors import UserError, command, first_line, listing
from common.process.main import explain, stop_behind
from common.process.progress import progress
from common.process.requirements import unmet

if TYPE_CHECKING:
    import pandas as pd

    from common.check.costs import Cost
    from common.data.ingest import Sample
    from common.recipes import Recipe

ROOT = Path(__file__).resolve().parents[2]
FINE, WARNING, FAILS, ESTIMATE = "fine", "warning", "will fail", "estimate"
T = TypeVar("T")
SECONDS = 60  # for reading headers, and half of it for decoding
DECODED = 200  # samples that are decoded wholly, at most


@dataclass(frozen=True)
class Check:
    """A line of the list: what was looked at, how it is, what was found, and how to mend it."""

    name: str
    state: str
    found: str
    cure: str = ""

    def __str__(self) -> str:
        text = self.found + (f"\n-> {self.cure}" if self.cure else "")
        return f"{self.state:10s} {self.name:22s} " + text.replace("\n", f"\n{'':34s}")


def examine(args: argparse.Namespace) -> None:
    """Print all checks as they are done; raises UserError where something will fail.

    args : of stage 01 with --check
    """
    print(f"before a run of {', '.join(args.recipes)} on {args.data} in {args.work}:", flush=True)
    states: Counter[str] = Counter()
    for check in checks(args):
        print(check, flush=True)
        states[check.state] += 1
    if states[FAILS]:
        raise UserError(f"{states[FAILS]} of these will fail; mend them as said after '->'")
    print(f"nothing will fail that could be seen from here; warnings: {states[WARNING]}")


def checks(args: argparse.Namespace) -> Iterator[Check]:
    """Yield everything that is known before a run, step by step; what cannot be looked at is left out."""
    yield from guarded("packages", packages())
    yield from guarded("hardware", hardware())
    yield from guarded("work folder", work_folder(args.work))
    seen = yield from guarded("input", look_at_input(args))
    if not seen:
        yield Check(
            "and the rest", WARNING, "labels, weights, memory, disk and time are looked at when the input is mended"
        )
        return
    from common.artifacts.layout import Layout

    folds = yield from guarded("labels", labels(args, seen))
    yield from guarded("weights", weights(args, seen))
    yield from guarded("work so far", work_so_far(args, seen))
    if folds is None:
        return
    costs: dict[str, Cost] = {}
    for name, recipe in seen.recipes.items():
        print(f"measuring steps of {name}, a minute at most on most machines", file=sys.stderr, flush=True)
        cost = yield from guarded(f"memory, {name}", memory(name, recipe, Layout(args.work, args.data).flags()))
        costs |= {name: cost} if cost else {}
    yield from guarded("disk", disk(args, seen, folds, costs))
    yield from guarded("time", times(args, seen, folds, costs))


def guarded(name: str, check: Generator[Check, None, T]) -> Generator[Check, None, T | None]:
    """Run one check; what ends it, a mistake or a missing package, becomes its last line."""
    try:
        return (yield from check)
    except UserError as error:
        yield Check(name, FAILS, str(error))
    except ImportError as error:
        if stop_behind(error):
            raise
        yield Check(name, FAILS, f"the package {error.name or error} cannot be imported", "see packages")
    except OSError as error:
        yield Check(name, FAILS, f"{error.filename or ''}: {error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        if stop_behind(error) or not (message := explain(error)):
            raise
        yield Check(name, FAILS, message)
    return None


# --- the machine -------------------------------------------------------------------------------------------


def packages() -> Generator[Check, None, None]:
    """Yield how Python and its packages are, against requirements.txt."""
    path = ROOT / "requirements.txt"
    problems = unmet([str(path)])
    for problem in problems:
        missing = problem.endswith("found nothing") or problem.startswith("python:")
        yield Check(
            "packages",
            FAILS if missing else WARNING,
            problem,
            f"bash run_all.sh makes a .venv with all of them; or: {sys.executable} -m pip install -r {path}",
        )
    if not problems:
        yield Check("packages", FINE, f"Python {sys.version.split()[0]} has all that requirements.txt asks for")


def hardware() -> Generator[Check, None, None]:
    """Yield which GPUs there are and whether they work, and whether loader processes can hand on their batches."""
    import torch

    from common.check.costs import cores, free_memory
    from common.train.hardware import Hardware, choose_hardware, idle_gpu

    free = free_memory(Hardware(torch.device("cpu")))
    yield Check("processor", FINE, f"{cores()} core{'s' * (cores() > 1)}, {gigabytes(free)} of memory free")
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            yield try_gpu(k)
    elif reason := idle_gpu():
        yield Check(
            "GPU",
            WARNING,
            f"there is one, but torch cannot use it ({reason})",
            f"update the driver to one for CUDA {torch.version.cuda or 'and install torch with CUDA'}",
        )
    else:
        yield Check("GPU", FINE, "none: all runs on the CPU")
    if not choose_hardware(trial=False).workers:
        yield Check("shared memory", FINE, "not needed: on a CPU no loader processes are started")


def try_gpu(number: int) -> Check:
    """Tell whether a GPU runs kernels of this torch, and what it is."""
    import torch

    from common.train.hardware import nvidia_driver, try_device

    driver = nvidia_driver() or "unknown"
    try:
        try_device(torch.device("cuda", number))
        left, whole = torch.cuda.mem_get_info(number)
    except (UserError, RuntimeError, AssertionError) as error:  # the last from a torch without CUDA
        return Check(
            "GPU",
            FAILS,
            first_line(error),
            f"install torch for this GPU and its driver ({driver}); or give stages 04 and 05 --device cpu",
        )
    return Check(
        "GPU",
        FINE,
        f"{torch.cuda.get_device_name(number)}, {gigabytes(left)} of {gigabytes(whole)} free, driver "
        f"{driver}, CUDA {torch.version.cuda}",
    )


def work_folder(work: Path) -> Generator[Check, None, None]:
    """Yield whether the work folder can be written, and who is at work in it."""
    from common.artifacts.locks import holders

    folder = existing(work)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        yield Check("work folder", FINE, f"{folder} can be written")
    except OSError as error:
        yield Check(
            "work folder",
            FAILS,
            f"{folder} cannot be written ({error.strerror})",
            "make room or get the right to, or give another --work",
        )
    for told in holders(work):
        yield Check("work folder", WARNING, told, "wait for its end before the same is made again")


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


# --- the input ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What was seen of the input, and what a sample takes."""

    samples: list  # all of them
    bad: dict  # sample -> why it cannot be used
    sides: dict  # sample -> side in pixels, of those whose headers were read
    recipes: dict  # name -> recipe as it fits to these
    store_seconds: float  # to decode, store and hash a sample
    read_seconds: dict[str, float]  # to read a stored one, for each recipe

    @property
    def usable(self) -> list:
        return [sample for sample in self.samples if sample not in self.bad]

    def side(self, sample: "Sample") -> int:
        """Return a sample's side in pixels; where its header was not read, the largest one seen."""
        return self.sides.get(sample, max(self.sides.values()))


def look_at_input(args: argparse.Namespace) -> Generator[Check, None, Seen | None]:
    """Yield how CSV files and images are; returns a `Seen`, None where no sample can be used."""
    from common.data.ingest import kept_going, list_samples

    args.keep_going |= kept_going(args.work)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        samples, bad = list_samples(args.data.resolve(), args.limit)
    parts = Counter(sample.part for sample in samples)
    yield Check("tables", FINE, ", ".join(f"{n} {part} samples" for part, n in parts.items()))
    for line in told.getvalue().splitlines():
        yield Check("tables", WARNING, line)
    if not parts["test"]:
        yield Check("tables", WARNING, "there are no test samples, so no submission will be made")
    for line in strays(args, samples):
        yield Check("tables", WARNING, line, "give them rows, or take no notice: they are not used")
    whole = [sample for sample in samples if sample not in bad]
    sides, doubtful = read_headers(whole, bad)
    seen = yield from decode_some(args, samples, bad, sides, doubtful)
    if bad:
        state, cure = FAILS, "mend or remove them, or leave them out with --keep-going"
        if args.keep_going:
            state, cure = WARNING, "they are left out, by name"
        yield Check("images", state, f"{len(bad)} samples cannot be used:\n{listing(bad.values())}", cure)
    if not seen:
        yield Check("images", FAILS, "no sample can be used, so nothing else can be looked at")
        return None
    sizes = ", ".join(f"{n} of {side} px" for side, n in sorted(Counter(sides.values()).items()))
    yield Check("images", FINE, f"{len(sides)} of {len(samples)} samples have four good headers ({sizes})")
    return seen


def strays(args: argparse.Namespace, samples: "list[Sample]") -> Iterator[str]:
    """Say which folders have images of Ids that no table has."""
    from common.data import sources

    known = {sample.Id for sample in samples}
    for name in (
        () if args.limit else ("train_full_size", "train", "test_full_size", "test", "external", "external/images")
    ):
        stems = [stem.rsplit("_", 1) for stem in sources.list_files(args.data / name)]
        unknown = sorted({stem[0] for stem in stems if len(stem) == 2 and stem[1] in sources.CHANNELS} - known)
        if unknown:
            yield f"{args.data / name} has images of {len(unknown)} Ids that no table has, such as {unknown[0]}"


def while_time_lasts(samples: "list[Sample]", seconds: float, label: str) -> "Iterator[Sample]":
    """Yield samples in turn until the time is over."""
    ends = time.monotonic() + seconds
    for sample in progress(samples, len(samples), label):
        if time.monotonic() > ends:
            return
        yield sample


def read_headers(samples: list, bad: dict) -> tuple[dict, list]:
    """Return the sides in pixels of as many samples as time allows, drawn at random (the same ones every time), and those
    of them that look cut short; what is wrong goes into `bad`."""
    import numpy as np

    from common.data import images, sources

    sides, doubtful = {}, []
    drawn = [samples[k] for k in np.random.default_rng(0).permutation(len(samples))]
    for sample in while_time_lasts(drawn, SECONDS, "reading headers"):
        found = images.attempt(sources.check_sample, sample.files, sample.rgb_coded)
        if isinstance(found, sources.BadImage):
            bad[sample] = f"{sample.part}: {found}"
            continue
        sides[sample] = found
        if any(map(sources.looks_cut_short, sample.files)):
            doubtful.append(sample)
    return sides, doubtful


def decode_some(
    args: argparse.Namespace, samples: list, bad: dict, sides: dict, doubtful: list
) -> Generator[Check, None, Seen | None]:
    """Decode some samples, the doubtful ones first, and store them in a temporary folder; yield how they are.

    Returns a `Seen`, None where no sample is good; what is wrong with a sample goes into `bad`.
    """
    from common.data import exposure, images, sources
    from common.data.duplicates import hash_planes
    from common.data.ingest import HASH_SIZE, cure_small, fit_recipes
    from common.recipes import describe_fit, get_recipes

    if not sides:
        return None
    notes: list[str] = []
    asked = get_recipes(args.recipes, args.settings, notes.append)
    yield from (Check("settings", WARNING, note) for note in notes)
    recipes, too_small = fit_recipes(asked, sides)
    if too_small:
        state = WARNING if args.keep_going else FAILS
        yield Check(
            "images",
            state,
            f"{len(too_small)} samples have fewer pixels than the recipes use",
            cure_small(asked, sides),
        )
    bad.update(too_small)
    sides = {sample: side for sample, side in sides.items() if sample not in too_small}
    small = str(min(HASH_SIZE, *sides.values()))
    stores = sorted({small, *(recipe.store for recipe in recipes.values())})
    levels = exposure.Levels(args.black_level, args.white_level)
    seconds, exposed = [], {}
    reading: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        first = [sample for sample in doubtful if sample in sides]
        for sample in while_time_lasts(list(dict.fromkeys([*first, *sides]))[:DECODED], SECONDS / 2, "decoding"):
            started = time.perf_counter()
            made = images.attempt(
                images.store_sample,
                sample.Id,
                sample.files,
                sample.rgb_coded,
                stores,
                Path(folder),
                levels,
                args.store == "raw",
            )
            if isinstance(made, sources.BadImage):
                bad[sample] = f"{sample.part}: {made}"
                continue
            hash_planes(images.read_planes(Path(folder) / small / f"{sample.Id}.tif"))
            seconds.append(time.perf_counter() - started)
            exposed[sample] = made[1]
            reading = {
                name: [*reading.get(name, []), seconds_to_read(Path(folder) / recipe.store / f"{sample.Id}.tif")]
                for name, recipe in recipes.items()
            }
    if not seconds:
        return None
    yield Check("images", FINE, f"{len(seconds)} samples, drawn at random, were decoded wholly and stored for trial")
    for name, recipe in recipes.items():
        if recipe != asked[name]:
            yield Check("images", FINE, describe_fit(name, asked[name], recipe))
    for line in exposure.describe(exposure.judge([sample.part for sample in exposed], list(exposed.values()), levels)):
        yield Check("images", WARNING, line)
    return Seen(
        samples, bad, sides, recipes, median(seconds), {name: median(values) for name, values in reading.items()}
    )


def seconds_to_read(path: Path) -> float:
    from common.data.images import read_planes

    started = time.perf_counter()
    read_planes(path)
    return time.perf_counter() - started


def labels(args: argparse.Namespace, seen: Seen) -> "Generator[Check, None, pd.DataFrame]":
    """Yield how classes are spread; returns the folds that there are, or would be if no sample was a duplicate."""
    import pandas as pd

    from common.artifacts.layout import Layout
    from common.data.folds import audit, fold_numbers, make_folds
    from common.data.labels import absent_classes, parse_targets
    from common.train.fold_data import known_folds

    labelled = [sample for sample in seen.usable if sample.part != "test"]
    absent = absent_classes(parse_targets([sample.Target for sample in labelled]))
    if absent:
        yield Check(
            "labels",
            WARNING,
            f"{len(absent)} of 28 classes have no sample and will count as 0: {', '.join(absent)}",
            "a class needs at least one sample a fold to be learnt and scored",
        )
    layout = Layout(args.work, args.data)
    if layout.folds.is_file():
        folds, origin = layout.read_folds(), f"folds of {layout.folds}"
    else:
        rows = [(s.Id, s.part, s.Target, s.Id, 1) for s in labelled]
        folds = make_folds(pd.DataFrame(rows, columns=["Id", "part", "Target", "group", "kept"]), args.n_folds, 4, 0)
        origin = "folds, before duplicates are left out"
    numbers = fold_numbers(folds)
    known_folds(args.work, folds, args.folds or numbers)
    rare = audit(folds)["classes_missing_folds"]
    if rare:
        yield Check(
            "labels",
            WARNING,
            f"{len(rare)} classes are too rare for {len(numbers)} folds: {', '.join(rare)}",
            "they count as 0 where a fold has none; more samples or fewer folds (03_make_folds.py --n-folds) help",
        )
    yield Check("labels", FINE, f"{len(labelled)} labelled samples in {len(numbers)} {origin}")
    return folds


# --- the recipes -------------------------------------------------------------------------------------------


def weights(args: argparse.Namespace, seen: Seen) -> Generator[Check, None, None]:
    """Yield for each encoder where its weights are, or whether their host answers."""
    from common.train.pretrained import PUBLISHED, answers, told_if_other, weight_files
    from common.train.start import start_from

    for encoder in sorted({recipe.encoder for recipe in seen.recipes.values()}):
        recipe = next(recipe for recipe in seen.recipes.values() if recipe.encoder == encoder)
        if args.pretrained == "auto" and encoder in PUBLISHED:
            files = weight_files(encoder, args.weights_dir)
            at_hand = next((path for path in files if path.is_file()), None)
            if not at_hand:
                host = next((url for url in PUBLISHED[encoder].urls if answers(url)), None)
                yield (
                    download_to(files[0].parent, encoder, host)
                    if host
                    else Check(
                        "weights",
                        WARNING,
                        f"{encoder}: the published weights are not at hand and their host does not answer, so "
                        "training starts from random ones and learns much less",
                        f"save {PUBLISHED[encoder].urls[0]} as {files[0].absolute()}",
                    )
                )
                continue
        else:
            at_hand = None if args.pretrained in ("auto", "none") else Path(args.pretrained)
            if at_hand and not at_hand.is_file():
                raise UserError(f"--pretrained {at_hand}: there is no such file")
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            if at_hand and args.pretrained == "auto":
                told_if_other(at_hand, PUBLISHED[encoder].sha256)
            start = start_from(recipe, args.pretrained, at_hand)
        yield Check(
            "weights",
            WARNING if told.getvalue() else FINE,
            f"{encoder}: {start.describe()}",
            told.getvalue().strip().removeprefix("warning: "),
        )


def download_to(folder: Path, encoder: str, host: str) -> Check:
    """Tell whether weights that a host has can be downloaded to a folder."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            file.write(bytes(4096))
        return Check("weights", FINE, f"{encoder}: will be downloaded from {host}")
    except OSError as error:
        return Check(
            "weights",
            FAILS,
            f"{encoder}: would be downloaded to {folder}, which cannot be written ({error.strerror})",
            "make room or get the right to, give --weights-dir a folder that can be written, or start from random "
            "weights with --pretrained none",
        )


def work_so_far(args: argparse.Namespace, seen: Seen) -> Generator[Check, None, None]:
    """Yield what of an earlier run in the work folder is of use, and which trainings would ask for --force."""
    from common.artifacts.layout import Layout
    from common.artifacts.stage import Stage
    from common.data.exposure import Levels, exposure_warning
    from common.data.folds import fold_numbers
    from common.data.ingest import known_states, preprocess_stage, wanted_stores
    from common.recipes import current_fields, get_recipes, run_parameters
    from common.train.checkpoints import FORMAT, made_from
    from common.train.fold_data import training_inputs

    layout = Layout(args.work, args.data)
    if not layout.samples.is_file():
        return
    if line := exposure_warning(args.work):
        yield Check("work so far", WARNING, f"the images that are stored: {line.removeprefix('warning: ')}")
    stores = wanted_stores(get_recipes(args.recipes, args.settings, lambda note: None).values())
    reason = (
        preprocess_stage(
            args.work,
            seen.samples,
            known_states(seen.samples, args.work, None),
            stores,
            Levels(args.black_level, args.white_level),
            args.keep_going,
            args.store == "raw",
            any(recipe.enlarge for recipe in seen.recipes.values()),
        ).why_stale()
        or ""
    )
    trained = []
    folds = layout.read_folds() if layout.folds.is_file() else None
    for name, recipe in seen.recipes.items() if folds is not None else ():
        for fold in args.folds or fold_numbers(folds):
            folder = layout.run(name, fold)
            begun = made_from(folder)
            if not begun:
                continue
            trained.append(f"{name} fold {fold}")
            kept = {key: value for key, value in begun["inputs"].items() if key == "weights"}
            stage = Stage(
                "04_train",
                folder / "best.pt",
                run_parameters(recipe, fold, 0, FORMAT),
                {**training_inputs(args.work, folds, recipe), **kept},
                complete=current_fields,
            )
            changes = stage.changes(begun)
            if changes:
                yield Check(
                    "work so far",
                    FAILS,
                    f"{folder} was trained on something else ({changes})",
                    f"{layout.command('04_train.py', '--recipe', name, '--folds', fold, '--force')} trains it again; or "
                    "give another --work",
                )
    if "changed" in reason and trained:
        yield Check(
            "work so far",
            WARNING,
            f"stage 01 will run again ({reason}); trained already: {', '.join(trained)}",
            "where images or labels come out different, these will ask for --force; another --work keeps them",
        )
    elif trained:
        yield Check("work so far", FINE, f"begun or trained already, to be gone on with: {', '.join(trained)}")


def memory(name: str, recipe: "Recipe", folders: Iterable[str] = ()) -> "Generator[Check, None, Cost]":
    """Yield whether a batch will fit into memory; returns the recipe's measured `Cost`."""
    from common.check.costs import batch_that_fits, free_memory, measure
    from common.train.hardware import choose_hardware

    hardware = choose_hardware()
    cost = measure(recipe)
    free = free_memory(hardware)
    fits, what = batch_that_fits(cost, free), f"{gigabytes(free)} free on the {'GPU' if hardware.is_gpu else 'machine'}"
    each = (
        f"about {gigabytes(cost.activations)} an image at {recipe.crop} px and {gigabytes(cost.fixed)} for the network"
    )
    if fits >= recipe.batch_size:
        yield Check(f"memory, {name}", FINE, f"a batch of {recipe.batch_size} fits: {each}, {what}")
    elif hardware.is_gpu and fits >= 2:
        yield Check(
            f"memory, {name}",
            FINE,
            f"a batch of {recipe.batch_size} is made of parts of about {fits} images, for a "
            f"third more time: {each}, {what}",
        )
    else:
        cure = "use a smaller crop: --set crop_size=..., or another machine"
        if fits >= 2:
            train = command("04_train.py", *folders, "--recipe", name, "--micro-batch", fits)
            cure = f"train with: {train}, then continue with run_all.sh"
        yield Check(f"memory, {name}", FAILS, f"a batch of {recipe.batch_size} does not fit: {each}, {what}", cure)
    if hardware.workers:
        yield shared_memory(recipe, hardware.workers, shutil.disk_usage("/dev/shm").free, name)
    return cost


def shared_memory(recipe: "Recipe", workers: int, free: int, name: str) -> Check:
    """Tell whether the batches that loader processes hold ready fit into shared memory."""
    from common.train.hardware import PREFETCHED, batch_bytes, loaders_that_fit

    batch = batch_bytes(recipe, recipe.batch_size)
    fits = loaders_that_fit(free, batch)
    found = f"{workers} loader processes need {gigabytes((PREFETCHED + 1) * workers * batch)} of /dev/shm, {gigabytes(free)} are free"
    if fits >= workers:
        return Check(f"shared memory, {name}", FINE, found)
    return Check(
        f"shared memory, {name}",
        WARNING,
        found,
        f"stages 04 and 05 will start {fits}; give more (docker run --shm-size=16g), or images may be read too slowly",
    )


def disk(
    args: argparse.Namespace, seen: Seen, folds: "pd.DataFrame", costs: "dict[str, Cost]"
) -> Generator[Check, None, None]:
    """Yield what the work folder will need of the disk, part by part, against what is free."""
    from common.artifacts.layout import Layout
    from common.check.costs import checkpoint_bytes
    from common.data.exposure import Levels
    from common.data.folds import fold_numbers
    from common.data.ingest import HASH_SIZE, is_of_kind, records_at, space_needed, stored_ids
    from common.recipes import stored_size

    stores = {str(min(HASH_SIZE, *seen.sides.values())), *(recipe.store for recipe in seen.recipes.values())}
    layout = Layout(args.work)
    there = {store: stored_ids(layout.store(store)) for store in stores}
    raw, levels = args.store == "raw", Levels(args.black_level, args.white_level)
    records = records_at(layout.journal, levels)
    images = space_needed(
        [
            stored_size(store, seen.side(s))
            for store in stores
            for s in seen.usable
            if s.Id not in there[store] or s.Id in records and not is_of_kind(records[s.Id], store, raw)
        ],
        raw,
    )
    numbers = args.folds or fold_numbers(folds)
    runs = sum(
        checkpoint_bytes(seen.recipes[name], cost)
        for name, cost in costs.items()
        for fold in numbers
        if not layout.network(name, fold, "last").is_file()
    )
    predicted = len(costs) * 28 * 4 * (len(folds) + (len(numbers) + 1) * len(seen.usable))
    needed, free = images + runs + predicted, shutil.disk_usage(existing(args.work)).free
    found = (
        f"about {gigabytes(needed)} more are needed (stored images {gigabytes(images)}, networks {gigabytes(runs)}), "
        f"{gigabytes(free)} are free in {existing(args.work)}"
    )
    state = FAILS if needed > free else WARNING if needed > 0.9 * free else FINE
    yield Check("disk", state, found, "" if state == FINE else "make room, or give another --work")


def times(
    args: argparse.Namespace, seen: Seen, folds: "pd.DataFrame", costs: "dict[str, Cost]"
) -> Generator[Check, None, None]:
    """Yield an estimate of the time of each stage, as if nothing was made yet."""
    from common.check.costs import batch_that_fits, cores, free_memory, training_seconds
    from common.data.folds import fold_numbers
    from common.train.hardware import choose_hardware

    hardware = choose_hardware()
    numbers = args.folds or fold_numbers(folds)
    everything = seen.store_seconds * len(seen.usable) / cores()
    yield Check(
        "time, 01 and 02",
        ESTIMATE,
        f"{duration(everything)}: {len(seen.usable)} samples at {seen.store_seconds:.3f} s, {cores()} at once",
    )
    looks = 8 if args.tta == "dihedral" else 1
    n_test = 0 if args.no_test else sum(sample.part == "test" for sample in seen.usable)
    for name, cost in costs.items():
        recipe = seen.recipes[name]
        fits = batch_that_fits(cost, free_memory(hardware))
        train = sum(
            training_seconds(recipe, cost, folds, fold, seen.read_seconds[name] / max(1, hardware.workers), fits)
            for fold in numbers
        )
        images = folds["fold"].isin(numbers).sum() + n_test * len(numbers)
        predict = images * (looks * cost.predict + seen.read_seconds[name] / max(1, hardware.workers))
        yield Check(
            f"time, 04 {name}",
            ESTIMATE,
            f"{duration(train)} at most: {len(numbers)} folds x {recipe.epochs} epochs, "
            f"{cost.train:.2g} s an image (median of {cost.steps} steps of {cost.images} images of {recipe.crop} px)",
        )
        yield Check(
            f"time, 05 {name}",
            ESTIMATE,
            f"{duration(predict)}: {images} images x {looks} views at {cost.predict:.2g} s",
        )
        everything += train + predict
    yield Check(
        "time, in all",
        ESTIMATE,
        f"{duration(everything)} at most, one fold after the other, on a "
        f"{hardware.device.type} as busy as it was now; training may end earlier",
    )


# --- words -------------------------------------------------------------------------------------------------


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Say a time in the unit that suits it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
