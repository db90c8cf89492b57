"""Stage 01's work, in three steps on one record per sample: plan, check, store.

plan   lists the samples, with their files and the files' state
check  reads the headers that no earlier run read, and chooses the sizes of the recipes' stored images
store  makes the images that no earlier run made
"""

import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from common.artifacts.files import clear_leftovers, csv_files
from common.artifacts.layout import Layout
from common.artifacts.stage import Stage, digest, read_sidecar, sidecar
from common.artifacts.tables import read_table, write_csv
from common.artifacts.text_tables import composed
from common.data import exposure, images, journal, sources
from common.data.labels import absent_classes, parse_targets
from common.data.options import IngestOptions
from common.data.samples import Sample, list_samples
from common.errors import UserError, listing
from common.process.parallel import run_parallel
from common.recipes import Recipe, describe_fits, fit_to_source, is_too_small, stored_size, to_dict

HASH_SIZE = 128  # pixels; every sample is stored at this size too, for stage 02
COMPRESSED = 0.35  # about this share of the raw bytes for a large stored image: 0.3 to 0.8 MB of 2.36 MB at 768 px
HEADERS = 1000  # bytes of a stored image that are not pixels


@dataclass(frozen=True)
class Plan:
    """What stage 01 will do. Each step returns the plan with more about its samples.

    work : the work folder, absolute, since workers may run in another folder
    fitted : name -> recipe fitted to the sources, once their sides are known (see `with_sizes`)
    stores : likewise, the folders of stored images that the recipes read, and the one that stage 02 reads
    """

    work: Path
    options: IngestOptions
    samples: list[Sample]
    fitted: dict[str, Recipe] = field(default_factory=dict)
    stores: tuple[str, ...] = ()

    @property
    def usable(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.fault]

    @property
    def faulty(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.fault]

    @property
    def sides(self) -> list[int]:
        """The known sides, in pixels, of usable sources."""
        return [sample.side for sample in self.usable if sample.side is not None]

    @property
    def journal(self) -> Path:
        return Layout(self.work).journal

    def recalled(self) -> "Plan":
        """Return the plan with the journal's records of its samples."""
        return replace(self, samples=journal.recall(self.samples, self.journal, self.options.levels))


# --- plan --------------------------------------------------------------------------------------------------


def make_plan(data: Path, work: Path, options: IngestOptions, n_jobs: int | None) -> Plan:
    """List the samples of an input folder, with the state of their files.

    If the previous run had --keep-going, so has this one.

    work : absolute
    n_jobs : processes that compare files whose entries have changed; None = assume that they are the same (see
        `journal.with_states`)
    Raises UserError for anything wrong with the CSV files.
    """
    samples = list_samples(data, options.limit)
    options = replace(options, keep_going=options.keep_going or kept_going(work))
    return Plan(work, options, journal.with_states(samples, Layout(work).journal, n_jobs))


def kept_going(work: Path) -> bool:
    """Tell whether the run that made samples.csv had --keep-going."""
    table = Layout(work).samples
    return sidecar(table).is_file() and bool(read_sidecar(table)["parameters"].get("keep_going"))


def preprocess_stage(work: Path, plan: Plan) -> Stage:
    """Return stage 01's outputs and inputs for a plan whose samples have their states."""
    levels, options = plan.options.levels, plan.options
    listed = pd.DataFrame([(s.Id, s.part, s.Target) for s in plan.samples])
    # Absent at the values from before these options existed, so that older work is up to date.
    chosen = {**({"black_level": levels.black} if levels.black else {}), **({"store": "raw"} if options.raw else {})}
    return Stage(
        "01_preprocess",
        Layout(work).samples,
        {
            "sizes": sorted({str(HASH_SIZE), *(recipe.store for recipe in options.recipes.values())}),
            "white_level": levels.white,
            **chosen,
            "keep_going": options.keep_going,
            "enlarge": any(recipe.enlarge for recipe in options.recipes.values()),
        },
        {"samples and labels": digest(listed), "image files": digest([s.state for s in plan.samples])},
    )


# --- check -------------------------------------------------------------------------------------------------


def check(plan: Plan, n_jobs: int) -> Plan:
    """Find the sides of all sources, and choose the sizes of their stored images.

    Raises UserError if no sample can be used, or if some are too small and --keep-going is not given. It does so before
    hours of storing, since the user may then choose other sizes.
    """
    plan = plan.recalled()
    plan = with_sizes(replace(plan, samples=read_sides(plan.samples, n_jobs)))
    small = [sample for sample in plan.faulty if sample.side is not None]
    if not plan.fitted or small and not plan.options.keep_going:
        refuse_bad(plan.samples, plan.work / "bad_files.csv", cure_small(plan) if small else "")
    if plan.faulty and not plan.options.keep_going:
        print(
            f"warning: {len(plan.faulty)} samples cannot be used, the first: {plan.faulty[0].fault}; the others are "
            "stored first, then all unusable ones are listed"
        )
    for line in describe_fits(plan.options.recipes, plan.fitted):
        print(line)
    return plan


def read_sides(samples: Sequence[Sample], n_jobs: int) -> list[Sample]:
    """Return the samples with the sides of their sources, or the fault of their headers, if not yet known."""
    checked = list(samples)
    new = [k for k, sample in enumerate(samples) if sample.side is None and not sample.fault]
    jobs = [(sources.check_sample, samples[k].files, samples[k].rgb_coded) for k in new]
    for place, result in run_parallel(images.attempt, jobs, n_jobs, "checking"):
        k = new[place]
        if isinstance(result, sources.BadImage):
            checked[k] = replace(samples[k], fault=str(result))
        else:
            checked[k] = replace(samples[k], side=result)
    return checked


def with_sizes(plan: Plan) -> Plan:
    """Return the plan with its recipes fitted to the sources whose sides are known.

    Samples that are too small for them get that as their fault. Without any side the plan is unchanged.
    """
    if not plan.sides:
        return plan
    fitted = fit_recipes(plan.options.recipes, plan.sides)
    plan = replace(
        plan,
        fitted=fitted,
        samples=[s if s.fault else replace(s, fault=why_too_small(s, fitted)) for s in plan.samples],
    )
    wanted = {hash_store(plan.sides), *(recipe.store for recipe in fitted.values())}
    return replace(plan, stores=tuple(sorted(wanted, key=lambda store: (len(store), store))))


def hash_store(sides: Iterable[int]) -> str:
    """Return the store that stage 02 reads; sides : of the sources in pixels."""
    return str(min([HASH_SIZE, *sides]))


def fit_recipes(recipes: dict[str, Recipe], sides: Iterable[int]) -> dict[str, Recipe]:
    """Return the recipes fitted to the sources.

    A recipe keeps its size if at least three quarters of the sources have it; else it gets the largest size that three
    quarters have. So one small image does not make all others smaller, and a set of small images is used as it is.

    sides : of the sources in pixels
    """
    ordered = sorted(sides)
    common = ordered[len(ordered) // 4]
    return {name: fit_to_source(recipe, common) for name, recipe in recipes.items()}


def why_too_small(sample: Sample, fitted: dict[str, Recipe]) -> str:
    """Describe for which recipes a sample is too small; '' if it is large enough, or its side is not known."""
    side = sample.side
    if side is None:
        return ""
    needed = {name: stored_size(recipe.store, side) for name, recipe in fitted.items() if is_too_small(recipe, side)}
    sizes = ", ".join(map(str, needed.values()))
    return (
        f"{sample.part}: {sample.Id} has {side} px, fewer than the {sizes} px of {', '.join(needed)}" if needed else ""
    )


def cure_small(plan: Plan) -> str:
    """Return the flags for samples that are too small: enlarge them, or use a size that all samples have."""
    cure = "enlarge samples that are too small with --set enlarge=true"
    smallest = min(sample.side for sample in plan.samples if sample.side is not None)
    if smallest < 32:  # no recipe has such small crops
        return f"{cure} (in stages 01 and 04)"
    changes = {
        field: value
        for recipe in plan.options.recipes.values()
        for field, value in to_dict(fit_to_source(recipe, smallest)).items()
        if to_dict(recipe)[field] != value
    }
    settings = " ".join(f"{field}={value}" for field, value in changes.items())
    return f"{cure}, or use all at the size of the smallest with --set {settings} (in stages 01 and 04)"


def bad_table(samples: Sequence[Sample]) -> pd.DataFrame:
    """Table of samples that cannot be used: Id, part, Target, place among the samples of that part, reason."""
    rows, counts = [], dict.fromkeys((sample.part for sample in samples), 0)
    for s in samples:
        if s.fault:
            rows.append({"Id": s.Id, "part": s.part, "Target": s.Target, "place": counts[s.part], "reason": s.fault})
        counts[s.part] += 1
    return pd.DataFrame(rows, columns=["Id", "part", "Target", "place", "reason"])


def refuse_bad(samples: Sequence[Sample], report: Path, cure: str = "") -> None:
    """Write a table of the faulty samples and raise a UserError that lists the first of them; `cure` is appended."""
    table = bad_table(samples)
    write_csv(report, table)
    tests = [sample for sample in samples if sample.part == "test"]
    absent = ""
    if tests and all(sample.fault and not sample.files for sample in tests):
        absent = "\nno test sample has images: with --keep-going there is no submission"
    raise UserError(
        f"{len(table)} samples cannot be used (all of them in {report}):\n{listing(table['reason'])}\n"
        "fix or remove them and run this again, or leave them out with --keep-going"
        f"{f'; {cure}' if cure else ''}{absent}"
    )


# --- store -------------------------------------------------------------------------------------------------


def store(plan: Plan, n_jobs: int) -> Plan:
    """Make the missing images of checked samples, resuming where an earlier run stopped.

    Raises UserError if the disk has no space for them. Raises it also, once all good samples are stored, if others
    cannot be used and --keep-going is not given.
    """
    plan = with_lacking(plan)
    folder, options = Layout(plan.work).images, plan.options
    make_room(plan)
    stored = list(plan.samples)
    todo = [k for k, sample in enumerate(stored) if sample.lacking]
    how = images.Storing(folder, options.levels, options.raw)
    with journal.appending(plan.journal) as append:
        for place, result in run_parallel(
            images.attempt, [(store_one, stored[k], how) for k in todo], n_jobs, "resizing"
        ):
            k = todo[place]
            if isinstance(result, sources.BadImage):
                stored[k] = replace(stored[k], fault=str(result))
            else:
                stored[k], content = result
                append(journal.record_of(stored[k], options.levels, content))
    plan = replace(plan, samples=stored)
    if not plan.usable or plan.faulty and not options.keep_going:
        refuse_bad(plan.samples, plan.work / "bad_files.csv")
    return plan


def store_one(sample: Sample, how: images.Storing) -> tuple[Sample, list[int] | None]:
    """Return the result of `images.store_sample`, and the content of the files."""
    return images.store_sample(sample, how), journal.content(sample.files)


def with_lacking(plan: Plan) -> Plan:
    """Return the plan with each sample's missing stores: those without a current image of the requested kind."""
    folder, stores = Layout(plan.work).images, plan.stores
    stored = {store: stored_ids(folder / store) for store in stores}

    def is_stored(sample: Sample, store: str) -> bool:
        return store in sample.images and sample.Id in stored[store] and is_of_kind(sample, store, plan.options.raw)

    lacking = [() if s.fault else tuple(store for store in stores if not is_stored(s, store)) for s in plan.samples]
    samples = [replace(sample, lacking=some) for sample, some in zip(plan.samples, lacking, strict=True)]
    return replace(plan, samples=samples)


def is_of_kind(sample: Sample, store: str, raw: bool) -> bool:
    """Tell whether a sample's stored image is compressed, or `raw`, as requested; small ones are always raw."""
    return stored_size(store, sample.side or 0) <= images.PLAIN_SIDE or (store in sample.raw) == raw


def make_room(plan: Plan) -> None:
    """Make the folder of stored images, delete leftovers of killed processes, and check the free space."""
    folder = Layout(plan.work).images
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, *(folder / store for store in plan.stores if (folder / store).is_dir())):
        clear_leftovers(place)
    check_space(sides_to_store(plan), plan.work, plan.options.raw)


def sides_to_store(plan: Plan) -> list[int]:
    """Return the side in pixels of each image to make; sources of unknown side count as the largest one."""
    largest = max(plan.sides)
    return [stored_size(store, sample.side or largest) for sample in plan.samples for store in sample.lacking]


def space_needed(sides: list[int], raw: bool = False) -> float:
    """Return about how many bytes stored images of these sides in pixels take."""
    return sum(
        HEADERS + len(sources.CHANNELS) * side**2 * (1 if raw or side <= images.PLAIN_SIDE else COMPRESSED)
        for side in sides
    )


def check_space(sides: list[int], work: Path, raw: bool = False) -> None:
    """Refuse to begin if the disk is too small; sides : of all images to store, in pixels."""
    needed = space_needed(sides, raw)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise UserError(
            f"about {needed / 1e9:.1f} GB are needed in {work} for {len(sides)} images, {free / 1e9:.1f} GB "
            "are free; free some space, or give another --work"
        )


# --- tables ------------------------------------------------------------------------------------------------


def write_tables(plan: Plan, layout: Layout) -> list[Path]:
    """Write the tables of a completed plan, samples.csv last; returns the others' paths."""
    for store in plan.stores:
        write_csv(layout.store_table(store), statistics_table(plan.usable, store))
    drop_outdated(plan, layout)
    write_csv(layout.left_out, bad_table(plan.samples))
    write_csv(layout.samples, sample_table(plan.usable))
    return [layout.left_out, *map(layout.store_table, plan.stores)]


def sample_table(samples: Sequence[Sample]) -> pd.DataFrame:
    """Table of all samples: Id, part (train, test, external), Target, side of the source in pixels."""
    return pd.DataFrame([{"Id": s.Id, "part": s.part, "Target": s.Target, "side": s.side} for s in samples])


def statistics_table(samples: list[Sample], store: str) -> pd.DataFrame:
    """Table of one store's images: Id, side in pixels, statistics per channel (0-1), crc of the pixels."""
    return pd.DataFrame([{"Id": sample.Id, **sample.images[store]} for sample in samples]).round(6)


def drop_outdated(plan: Plan, layout: Layout) -> None:
    """Delete the tables of other stores whose sources have changed; stages that need one print how to make it."""
    for table in csv_files(layout.images):
        if table.stem in plan.stores:
            continue
        listed = set(read_table(table, layout.preprocess_command(table.stem))["Id"])
        if any(sample.Id in listed and table.stem not in sample.images for sample in plan.samples):
            print(
                f"{table} is deleted: source images or levels have changed since; its recipes need "
                "01_preprocess.py again"
            )
            table.unlink()


def all_stored(Ids: Collection[str], folder: Path) -> bool:
    """Tell whether every sample is stored at every size of which `folder` has a table."""
    return all(set(Ids) <= stored_ids(table.with_suffix("")) for table in csv_files(folder))


def stored_ids(folder: Path) -> set[str]:
    names = os.listdir(folder) if folder.is_dir() else ()
    return {composed(name.removesuffix(".tif")) for name in names if name.endswith(".tif")}


def judge_exposure(plan: Plan) -> dict:
    """Judge the exposure of the usable samples' sources (see `exposure.judge`)."""
    return exposure.judge([s.part for s in plan.usable], [s.exposure for s in plan.usable], plan.options.levels)


def describe(plan: Plan, judged: dict, layout: Layout) -> list[str]:
    """Describe what is stored now, with warnings."""
    counts = pd.Series([sample.part for sample in plan.usable]).value_counts()
    parts = ", ".join(f"{counts[part]} {part}" for part in ("train", "test", "external") if part in counts)
    lines = [f"{parts} samples at {', '.join(plan.stores)} px in {layout.images}"]
    if plan.faulty:
        lines.append(
            f"warning: {len(plan.faulty)} samples are left out here and in all stages (all of them in "
            f"{layout.left_out}):\n{listing(sample.fault for sample in plan.faulty)}"
        )
    lines += [f"warning: {line}" for line in exposure.describe(judged)]
    absent = absent_classes(parse_targets([sample.Target for sample in plan.usable if sample.part == "train"]))
    if absent:
        lines.append(f"warning: {len(absent)} classes have no training sample: {', '.join(absent)}")
    return lines
