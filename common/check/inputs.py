"""Check tables, images and labels before a run: headers for a minute, whole images for half a minute."""

import argparse
import contextlib
import io
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.layout import Layout
from common.check.lines import FAILS, FINE, WARNING, Check, Checks, median
from common.data import exposure, images, ingest, sources
from common.data.duplicates import hash_planes
from common.data.folds import audit, fold_numbers, plan_folds
from common.data.labels import absent_classes, parse_targets
from common.data.options import FoldOptions, ingest_options
from common.data.samples import Sample
from common.errors import listing
from common.process.progress import progress
from common.recipes import Recipe, describe_fits

SECONDS = 60  # for reading headers, and half of it for decoding
DECODED = 200  # samples that are decoded completely, at most
FOLDERS = ("train_full_size", "train", "test_full_size", "test", "external", "external/images")


@dataclass(frozen=True)
class Seen:
    """What was found in the input, and the time per sample.

    plan : of stage 01, with the sides of the samples whose headers were read, and the faults that were found
    """

    plan: ingest.Plan
    store_seconds: float  # to decode, store and hash a sample
    read_seconds: dict[str, float]  # to read a stored image, for each recipe

    @property
    def recipes(self) -> dict[str, Recipe]:
        return self.plan.fitted


def look_at_input(args: argparse.Namespace) -> Checks[Seen | None]:
    """Check CSV files and images; returns a `Seen`, or None if no sample can be used."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        notes: list[str] = []
        options = ingest_options(args, notes.append, keep=False)
        plan = ingest.make_plan(args.data.resolve(), args.work.resolve(), options, None)
    yield from tables(args, plan.samples, told.getvalue().splitlines())
    samples, doubtful = read_headers(plan.samples)
    plan = ingest.with_sizes(replace(plan, samples=samples))
    yield from (Check("settings", WARNING, note) for note in notes)
    yield from too_small(plan)
    trial, headers = try_samples(plan, doubtful), plan.sides
    yield from trial.lines(plan)
    plan = replace(plan, samples=[replace(s, fault=trial.faults.get(s.Id, s.fault)) for s in plan.samples])
    if plan.faulty:
        yield unusable(plan)
    if not trial.seconds:
        yield Check("images", FAILS, "no sample can be used, so nothing else can be checked")
        return None
    sizes = ", ".join(f"{n} of {side} px" for side, n in sorted(Counter(headers).items()))
    yield Check("images", FINE, f"{len(headers)} of {len(plan.samples)} samples have four good headers ({sizes})")
    return Seen(plan, median(trial.seconds), {name: median(values) for name, values in trial.reading.items()})


def tables(args: argparse.Namespace, samples: Sequence[Sample], told: Sequence[str]) -> Checks[None]:
    """Yield what the tables list, and their problems; told : lines printed while the samples were listed."""
    parts = Counter(sample.part for sample in samples)
    yield Check("tables", FINE, ", ".join(f"{n} {part} samples" for part, n in parts.items()))
    for line in told:
        yield Check("tables", WARNING, line)
    if not parts["test"]:
        yield Check("tables", WARNING, "there are no test samples, so no submission will be made")
    for line in () if args.limit else strays(args.data, {sample.Id for sample in samples}):
        yield Check("tables", WARNING, line, "give them rows, or ignore this: they are not used")


def strays(data: Path, known: set[str]) -> Iterator[str]:
    """Describe the folders with images of Ids that are in no table."""
    for name in FOLDERS:
        stems = [stem.rsplit("_", 1) for stem in sources.list_files(data / name)]
        unknown = sorted({stem[0] for stem in stems if len(stem) == 2 and stem[1] in sources.CHANNELS} - known)
        if unknown:
            yield f"{data / name} has images of {len(unknown)} Ids that are in no table, for example {unknown[0]}"


def too_small(plan: ingest.Plan) -> Checks[None]:
    """Yield how many samples have fewer pixels than the recipes use."""
    small = [sample for sample in plan.faulty if sample.side is not None]
    if small:
        state = WARNING if plan.options.keep_going else FAILS
        found = f"{len(small)} samples have fewer pixels than the recipes use"
        yield Check("images", state, found, ingest.cure_small(plan))


def unusable(plan: ingest.Plan) -> Check:
    """Name the samples that cannot be used."""
    state, cure = FAILS, "fix or remove them, or leave them out with --keep-going"
    if plan.options.keep_going:
        state, cure = WARNING, "they are left out, by name"
    faults = listing(sample.fault for sample in plan.faulty)
    return Check("images", state, f"{len(plan.faulty)} samples cannot be used:\n{faults}", cure)


# --- images ------------------------------------------------------------------------------------------------


def while_time_lasts(items: Sequence[int], seconds: float, label: str) -> Iterator[int]:
    """Yield items in turn until time is up."""
    ends = time.monotonic() + seconds
    for item in progress(items, len(items), label):
        if time.monotonic() > ends:
            return
        yield item


def read_headers(samples: Sequence[Sample]) -> tuple[list[Sample], list[int]]:
    """Return the samples with their side or fault, and the places of those that look cut short.

    Reads as many as time allows, drawn at random, but the same ones every time.
    """
    seen, doubtful = list(samples), []
    whole = [k for k, sample in enumerate(samples) if not sample.fault]
    drawn = [whole[k] for k in np.random.default_rng(0).permutation(len(whole))]
    for k in while_time_lasts(drawn, SECONDS, "reading headers"):
        found = images.attempt(sources.check_sample, samples[k].files, samples[k].rgb_coded)
        if isinstance(found, sources.BadImage):
            seen[k] = replace(samples[k], fault=f"{samples[k].part}: {found}")
            continue
        seen[k] = replace(samples[k], side=found)
        if any(map(sources.looks_cut_short, samples[k].files)):
            doubtful.append(k)
    return seen, doubtful


@dataclass
class Trial:
    """The results of decoding and storing some samples."""

    seconds: list[float] = field(default_factory=list)  # per sample
    reading: dict[str, list[float]] = field(default_factory=dict)  # recipe -> seconds to read each stored image
    stored: list[Sample] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)  # Id -> why it cannot be used

    def lines(self, plan: ingest.Plan) -> Iterator[Check]:
        """Yield the results."""
        if not self.seconds:
            return
        n = len(self.seconds)
        yield Check("images", FINE, f"{n} samples, drawn at random, were decoded completely and stored as a trial")
        for line in describe_fits(plan.options.recipes, plan.fitted):
            yield Check("images", FINE, line)
        judged = exposure.judge([s.part for s in self.stored], [s.exposure for s in self.stored], plan.options.levels)
        for line in exposure.describe(judged):
            yield Check("images", WARNING, line)


def try_samples(plan: ingest.Plan, doubtful: Sequence[int]) -> Trial:
    """Decode and store some samples in a temporary folder, the doubtful ones first, then read them back."""
    trial = Trial()
    known = [k for k, sample in enumerate(plan.samples) if sample.side is not None and not sample.fault]
    first = [k for k in doubtful if not plan.samples[k].fault]
    order = np.random.default_rng(0).permutation(len(known))
    chosen = list(dict.fromkeys([*first, *(known[k] for k in order)]))[:DECODED]
    with tempfile.TemporaryDirectory() as folder:
        how = images.Storing(Path(folder), plan.options.levels, plan.options.raw)
        for k in while_time_lasts(chosen, SECONDS / 2, "decoding"):
            try_sample(trial, replace(plan.samples[k], lacking=plan.stores), how, plan)
    return trial


def try_sample(trial: Trial, sample: Sample, how: images.Storing, plan: ingest.Plan) -> None:
    """Decode, store, hash and read one sample, and record the results."""
    started = time.perf_counter()
    stored = images.attempt(images.store_sample, sample, how)
    if isinstance(stored, images.BadImage):
        trial.faults[sample.Id] = f"{sample.part}: {stored}"
        return
    hash_planes(images.read_planes(how.folder / ingest.hash_store(plan.sides) / f"{sample.Id}.tif"))
    trial.seconds.append(time.perf_counter() - started)
    trial.stored.append(stored)
    for name, recipe in plan.fitted.items():
        trial.reading.setdefault(name, []).append(seconds_to_read(how.folder / recipe.store / f"{sample.Id}.tif"))


def seconds_to_read(path: Path) -> float:
    started = time.perf_counter()
    images.read_planes(path)
    return time.perf_counter() - started


# --- labels ------------------------------------------------------------------------------------------------


def labels(args: argparse.Namespace, seen: Seen) -> Checks[pd.DataFrame]:
    """Check the classes' numbers of samples; returns the folds, existing or as they would be without duplicates."""
    from common.train.fold_data import known_folds  # needs torch, unlike the checks before

    labelled = [sample for sample in seen.plan.usable if sample.part != "test"]
    absent = absent_classes(parse_targets([sample.Target for sample in labelled]))
    if absent:
        yield Check(
            "labels",
            WARNING,
            f"{len(absent)} of 28 classes have no sample and will count as 0: {', '.join(absent)}",
            "a class needs at least one sample per fold to be trained and scored",
        )
    folds, origin = folds_of(args, labelled)
    numbers = fold_numbers(folds)
    known_folds(args.work, folds, args.folds or numbers)
    rare = audit(folds)["classes_missing_folds"]
    if rare:
        yield Check(
            "labels",
            WARNING,
            f"{len(rare)} classes are too rare for {len(numbers)} folds: {', '.join(rare)}",
            "they count as 0 in a fold without them; more samples or fewer folds (03_make_folds.py --n-folds) help",
        )
    yield Check("labels", FINE, f"{len(labelled)} labelled samples in {len(numbers)} {origin}")
    return folds


def folds_of(args: argparse.Namespace, labelled: Sequence[Sample]) -> tuple[pd.DataFrame, str]:
    """Return the folds, existing or as they would be without duplicates, and their description."""
    layout = Layout(args.work, args.data)
    if layout.folds.is_file():
        return layout.read_folds(), f"folds of {layout.folds}"
    folds = plan_folds(ingest.sample_table(labelled), FoldOptions(args.n_folds))
    return folds, "folds, before duplicates are left out"
