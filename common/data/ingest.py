"""Stage 01's work: list every sample of the input folder, check it, and store it at every size needed."""

import json
import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.artifacts.files import clear_leftovers, csv_files, naming
from common.artifacts.layout import Layout
from common.artifacts.stage import Stage, digest, read_sidecar, sidecar
from common.artifacts.tables import check_ids, read_table, write_csv
from common.artifacts.text_tables import composed
from common.data import exposure, images, sources, tiff
from common.data.exposure import WHOLE, Levels
from common.data.labels import absent_classes, parse_targets, read_csv, read_labels
from common.errors import UserError, listing
from common.process.parallel import run_parallel
from common.recipes import Recipe, describe_fit, fit_to_source, is_too_small, stored_size, to_dict

HASH_SIZE = 128  # pixels; every sample is stored at this size too, for stage 02
COMPRESSED = 0.35  # of the raw bytes that a large stored image takes, about: 0.3 to 0.8 MB of 2.36 MB at 768 px
HEADERS = 1000  # bytes of a stored image that are not pixels


@dataclass(frozen=True)
class Sample:
    """One sample of the input: its four channel files in the order of `sources.CHANNELS`, and where it belongs."""

    Id: str
    part: str  # train, test or external
    Target: str
    files: tuple[Path, ...]

    @property
    def rgb_coded(self) -> bool:
        return self.part == "external"


# --- what there is -----------------------------------------------------------------------------------------


def list_samples(data: Path, limit: int | None = None) -> tuple[list[Sample], dict[Sample, str]]:
    """List all samples of an input folder: train, test, external; and those that lack files, with the reason.

    limit : keep this many training samples, drawn at random but always the same ones
    Raises UserError for anything wrong with the CSV files.
    """
    train = read_labels(data / "train.csv")
    if limit is not None and limit < len(train):
        train = train.iloc[np.sort(np.random.default_rng(0).permutation(len(train))[:limit])]
    test_folders = [sources.list_files(data / "test_full_size"), sources.list_files(data / "test")]
    parts: list[tuple[str, pd.DataFrame, list[sources.Files]]] = [
        ("train", train, [sources.list_files(data / "train_full_size"), sources.list_files(data / "train")]),
        ("test", list_test(data, test_folders), test_folders),
        ("external", *list_external(data)),
    ]
    samples, bad = [], {}
    for part, frame, folders in parts:
        for row in frame.itertuples():
            files, lacking = sources.channel_files(row.Id, folders)
            samples.append(Sample(row.Id, part, row.Target, tuple(files)))
            if lacking:
                bad[samples[-1]] = f"{part}: {sources.not_found(lacking, folders)}"
    ids = pd.Series([sample.Id for sample in samples])
    if ids.duplicated().any():
        raise UserError(
            f"{data}: these Ids appear in more than one of train.csv, sample_submission.csv and "
            f"external.csv:\n{listing(ids[ids.duplicated()])}"
        )
    return samples, bad


def list_test(data: Path, folders: list[sources.Files]) -> pd.DataFrame:
    """Test Ids in the order of sample_submission.csv, or without that file those of the images, sorted."""
    submission = data / "sample_submission.csv"
    if submission.is_file():
        return read_csv(submission, "Predicted").assign(Target="")
    ids = {stem.removesuffix("_green") for files in folders for stem in files if stem.endswith("_green")}
    check_ids(sorted(ids), data)
    if ids:
        print(f"{submission} is missing: the {len(ids)} samples in the test folders are taken, sorted by Id")
    return pd.DataFrame({"Id": sorted(ids), "Target": ""}, dtype=str)


def list_external(data: Path) -> tuple[pd.DataFrame, list[sources.Files]]:
    """External labels and image folders; empty where the input has none."""
    tables = [path for path in (data / "external" / "external.csv", data / "external.csv") if path.is_file()]
    if not tables:
        return pd.DataFrame({"Id": [], "Target": []}, dtype=str), []
    return read_labels(tables[0]), [
        sources.list_files(data / "external"),
        sources.list_files(data / "external" / "images"),
    ]


def source_state(sample: Sample, entry: bool = True) -> str:
    """Fingerprint a sample's files by name, size and times of change, without reading them; programs that copy or unpack
    files set the time of their content (mtime), none that of their entry (ctime).

    entry : whether that of the entry counts, which new rights or another owner change too
    """
    stats = [(path.name, path.stat()) for path in sample.files]
    return digest(
        [[name, stat.st_size, stat.st_mtime_ns, *((stat.st_ctime_ns,) if entry else ())] for name, stat in stats]
    )


def content(files: tuple[Path, ...]) -> list[int] | None:
    """Return the CRC-32 of each file's bytes, None where one cannot be read."""
    try:
        return [tiff.crc32(tiff.read_bytes(path)) for path in files]
    except OSError:
        return None


def wanted_stores(recipes: Iterable[Recipe]) -> list[str]:
    """Return the folders of stored images that recipes ask for, and the one that stage 02 reads."""
    return sorted({str(HASH_SIZE), *(recipe.store for recipe in recipes)})


def fit_recipes(recipes: dict[str, Recipe], sides: dict[Sample, int]) -> tuple[dict[str, Recipe], dict[Sample, str]]:
    """Return the recipes as they fit the sources, and the samples that are too small for them, with the reason.

    sides : of the sources in pixels
    A recipe keeps its size where at least three quarters of the sources have it; else it gets the largest that three quarters
    have. So one small image does not make all others smaller, and a set of small images is used as it is.
    """
    common = sorted(sides.values())[len(sides) // 4]
    fitted = {name: fit_to_source(recipe, common) for name, recipe in recipes.items()}
    small = {}
    for sample, side in sides.items():
        needed = {
            name: stored_size(recipe.store, side) for name, recipe in fitted.items() if is_too_small(recipe, side)
        }
        if needed:
            sizes = ", ".join(map(str, needed.values()))
            small[sample] = (
                f"{sample.part}: {sample.Id} has {side} px, fewer than the {sizes} px of {', '.join(needed)}"
            )
    return fitted, small


def cure_small(recipes: dict[str, Recipe], sides: dict[Sample, int]) -> str:
    """Say what to give where samples are too small: enlarge them, or use all at a size that each of them has."""
    cure, smallest = "enlarge those that are too small with --set enlarge=true", min(sides.values())
    if smallest < 32:  # no recipe has such small crops
        return f"{cure} (in stages 01 and 04)"
    changes = {
        field: value
        for recipe in recipes.values()
        for field, value in to_dict(fit_to_source(recipe, smallest)).items()
        if to_dict(recipe)[field] != value
    }
    settings = " ".join(f"{field}={value}" for field, value in changes.items())
    return f"{cure}, or use all at the size of the smallest with --set {settings} (in stages 01 and 04)"


def kept_going(work: Path) -> bool:
    """Tell whether the run that made samples.csv was to leave out what cannot be used."""
    table = Layout(work).samples
    return sidecar(table).is_file() and bool(read_sidecar(table)["parameters"].get("keep_going"))


def preprocess_stage(
    work: Path,
    samples: list[Sample],
    states: dict[Sample, str],
    stores: list[str],
    levels: Levels,
    keep_going: bool,
    raw: bool = False,
    enlarge: bool = False,
) -> Stage:
    """Return stage 01 as it would be made from these samples, whose files are in these states."""
    listed = pd.DataFrame([(s.Id, s.part, s.Target) for s in samples])
    # Absent where they are as before there was a choice: what was made then is up to date.
    chosen = {**({"black_level": levels.black} if levels.black else {}), **({"store": "raw"} if raw else {})}
    return Stage(
        "01_preprocess",
        Layout(work).samples,
        {"sizes": stores, "white_level": levels.white, **chosen, "keep_going": keep_going, "enlarge": enlarge},
        {"samples and labels": digest(listed), "image files": digest(list(states.values()))},
    )


# --- the journal: what earlier runs finished ---------------------------------------------------------------


def records_at(journal: Path, levels: Levels) -> dict[str, dict]:
    """Return the last record of each Id whose images were made with these levels."""
    return {
        Id: record
        for Id, record in read_journal(journal).items()
        if (record.get("black", 0), record.get("white")) == levels
    }


def read_journal(path: Path) -> dict[str, dict]:
    """Read one record per Id; a line cut short by a kill is left out, so that its sample is made again."""
    records = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if isinstance(record["side"], int) and all(
                    isinstance(values, dict) for values in record["stores"].values()
                ):
                    records[record["Id"]] = {**record, "source": record["source"], "raw": list(record.get("raw", []))}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
    return records


def exposure_in(record: dict) -> dict:
    """Return how a record's files are exposed; those of earlier versions have the largest 16-bit value, or None."""
    peak = record.get("peak")
    return record.get("exposure") or {"ranges": [] if peak is None else [[0, peak]], "misplaced": {}}


def valid_stores(record: dict | None, state: str) -> dict[str, dict]:
    """Return store -> statistics for what a sample's record has of the source files that there are now."""
    return record["stores"] if record and record["source"] == state else {}


def is_of_kind(record: dict, store: str, raw: bool) -> bool:
    """Tell whether a sample's image in a store is compressed, or `raw`, as is asked for; small ones are the same in both."""
    return stored_size(store, record["side"]) <= images.PLAIN_SIDE or (store in record["raw"]) == raw


def known_states(samples: list[Sample], work: Path, n_jobs: int | None) -> dict[Sample, str]:
    """Return the state of each sample's files: that in which the journal knows them, where only the times of their entries
    have changed and their content has not. The journal then notes the new times, so that nothing is read twice.

    n_jobs : processes that read files; None = content is taken for unchanged, and nothing is read or noted
    """
    journal = Layout(work).journal
    records, states = read_journal(journal), {sample: source_state(sample) for sample in samples}
    moved = [
        s
        for s in samples
        if s.Id in records
        and "content" in records[s.Id]
        and states[s] != records[s.Id]["source"]
        and records[s.Id].get("unmoved") == source_state(s, entry=False)
    ]
    same = [s for s in moved if n_jobs is None or records[s.Id].get("seen") == states[s]]
    doubtful = [s for s in moved if s not in set(same)]
    if doubtful and n_jobs is not None:
        with naming(journal), open(journal, "a", encoding="utf-8") as file:
            for k, found in run_parallel(content, [(s.files,) for s in doubtful], n_jobs, "comparing"):
                record = records[doubtful[k].Id]
                if found == record["content"]:
                    same.append(doubtful[k])
                    file.write(json.dumps(record | {"seen": states[doubtful[k]]}) + "\n")
    return states | {s: records[s.Id]["source"] for s in same}


# --- checking and making -----------------------------------------------------------------------------------


def store_and_read(Id: str, files: tuple[Path, ...], *more: Any) -> tuple:
    """Return what `images.store_sample` returns, and the content of the files."""
    return *images.store_sample(Id, files, *more), content(files)


def bad_table(bad: dict[Sample, str], samples: list[Sample]) -> pd.DataFrame:
    """Table of samples that cannot be used: Id, part, Target, place among the samples of that part, reason."""
    places: dict[Sample, int] = {}
    counts: dict[str, int] = {}
    for sample in samples:
        places[sample] = counts.setdefault(sample.part, 0)
        counts[sample.part] += 1
    return pd.DataFrame(
        [(s.Id, s.part, s.Target, places[s], bad[s]) for s in samples if s in bad],
        columns=["Id", "part", "Target", "place", "reason"],
    )


def refuse_bad(bad: dict[Sample, str], samples: list[Sample], report: Path, cure: str = "") -> None:
    """Write a table of the bad samples and raise a UserError that lists the first of them; `cure` is added to it."""
    table = bad_table(bad, samples)
    write_csv(report, table)
    tests = [sample for sample in samples if sample.part == "test"]
    absent = ""
    if tests and all(sample in bad and not sample.files for sample in tests):
        absent = "\nno test sample has its images: with --keep-going there is no submission"
    raise UserError(
        f"{len(bad)} samples cannot be used (all of them in {report}):\n{listing(table['reason'])}\n"
        "mend or remove them and run this again, or leave them out with --keep-going"
        f"{f'; {cure}' if cure else ''}{absent}"
    )


def space_needed(sides: list[int], raw: bool = False) -> float:
    """Return the bytes that images of these sides in pixels take when stored, about."""
    return sum(
        HEADERS + len(sources.CHANNELS) * side**2 * (1 if raw or side <= images.PLAIN_SIDE else COMPRESSED)
        for side in sides
    )


def check_space(sides: list[int], work: Path, raw: bool = False) -> None:
    """Refuse to begin what the disk cannot hold; sides : of all images to store, in pixels."""
    needed = space_needed(sides, raw)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise UserError(
            f"about {needed / 1e9:.1f} GB are needed in {work} for {len(sides)} images, {free / 1e9:.1f} GB "
            "are free; make room, or give another --work"
        )


@dataclass(frozen=True)
class Stored:
    """What stage 01 made, all in the order of `samples`: sides of the sources in pixels, store -> statistics of each
    image; how the sources are exposed (see `exposure.judge`); and the samples that cannot be used, with the reason."""

    samples: list[Sample]
    sides: list[int]
    statistics: dict[str, list[dict]]
    exposure: dict
    bad: dict[Sample, str]


def store_all(
    samples: list[Sample],
    states: dict[Sample, str],
    bad: dict[Sample, str],
    recipes: dict[str, Recipe],
    work: Path,
    n_jobs: int,
    levels: Levels = WHOLE,
    keep_going: bool = False,
    raw: bool = False,
) -> Stored:
    """Check and store all samples, going on where an earlier run stopped.

    states : what the files of each sample were, as `source_state` says
    bad : samples known to be of no use; keep_going : leave these and what else is found out, rather than refuse
    recipes : name -> recipe whose images are stored, at sizes that fit the sources: see `fit_recipes`
    raw : store large images uncompressed; those of the other kind are made again
    """
    folder = Layout(work).images
    journal = folder / "journal.jsonl"
    records = records_at(journal, levels)
    bad = dict(bad)
    known = {s: records[s.Id]["side"] for s in samples if s.Id in records and records[s.Id]["source"] == states[s]}
    new = [s for s in samples if s not in known and s not in bad]
    for k, result in run_parallel(
        images.attempt, [(sources.check_sample, s.files, s.rgb_coded) for s in new], n_jobs, "checking"
    ):
        if isinstance(result, sources.BadImage):
            bad[new[k]] = str(result)
        else:
            known[new[k]] = result
    if not known:
        refuse_bad(bad, samples, work / "bad_files.csv")
    sides = {s: known[s] for s in samples if s in known}
    fitted, small = fit_recipes(recipes, sides)
    if small and not keep_going:  # before hours of storing: what is chosen may be other sizes
        refuse_bad(bad | small, samples, work / "bad_files.csv", cure_small(recipes, sides))
    if bad and not keep_going:
        print(
            f"warning: {len(bad)} samples cannot be used, the first: {next(iter(bad.values()))}; the others are stored, "
            "then all such samples are listed"
        )

    bad |= small
    sides = {s: side for s, side in sides.items() if s not in small}
    for name, recipe in recipes.items():
        if fitted[name] != recipe:
            print(describe_fit(name, recipe, fitted[name]))
    wanted = {str(min(HASH_SIZE, *sides.values())), *(recipe.store for recipe in fitted.values())}
    stores = sorted(wanted, key=lambda store: (len(store), store))
    stored = {store: stored_ids(folder / store) for store in stores}
    valid = {s: valid_stores(records.get(s.Id), states[s]) for s in sides}
    done = {
        s: {
            store: values
            for store, values in made.items()
            if s.Id in stored.get(store, ()) and is_of_kind(records[s.Id], store, raw)
        }
        for s, made in valid.items()
    }
    exposed = {s: exposure_in(records[s.Id]) for s in done if done[s]}
    lacking = {s: [store for store in stores if store not in done[s]] for s in done}
    todo = [s for s in done if lacking[s]]
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, *(folder / store for store in stores if (folder / store).is_dir())):
        clear_leftovers(place)
    check_space([stored_size(store, known[s]) for s in todo for store in lacking[s]], work, raw)
    jobs = [(store_and_read, s.Id, s.files, s.rgb_coded, lacking[s], folder, levels, raw) for s in todo]
    with naming(journal), open(journal, "a", encoding="utf-8") as file:
        for k, result in run_parallel(images.attempt, jobs, n_jobs, "resizing"):
            sample = todo[k]
            if isinstance(result, sources.BadImage):
                bad[sample] = str(result)
                continue
            made, exposed[sample], read = result
            done[sample].update(made)
            others = [store for store in valid[sample] if store in records[sample.Id]["raw"] and store not in made]
            before = records.get(sample.Id, {})
            seen = {"seen": before["seen"]} if "seen" in before and before["source"] == states[sample] else {}
            record = {
                "Id": sample.Id,
                "source": states[sample],
                "unmoved": source_state(sample, entry=False),
                "content": read,
                **seen,
                "side": known[sample],
                **levels._asdict(),
                "exposure": exposed[sample],
                "stores": valid[sample] | done[sample],
                "raw": others + (list(made) if raw else []),
            }
            file.write(json.dumps(record) + "\n")
            file.flush()
    if bad and not keep_going:
        refuse_bad(bad, samples, work / "bad_files.csv")
    used = [s for s in samples if s not in bad]
    if not used:
        refuse_bad(bad, samples, work / "bad_files.csv")
    return Stored(
        used,
        [known[s] for s in used],
        {store: [done[s][store] for s in used] for store in stores},
        exposure.judge([s.part for s in used], [exposed[s] for s in used], levels),
        bad,
    )


def drop_outdated(
    folder: Path, stores: Collection[str], samples: list[Sample], states: dict[Sample, str], levels: Levels
) -> None:
    """Delete the tables of stores that were not made now and hold images of sources that have changed since: whoever needs
    one is told to make it."""
    tables = [table for table in csv_files(folder) if table.stem not in stores]
    records = records_at(folder / "journal.jsonl", levels) if tables else {}
    for table in tables:
        listed = set(read_table(table, Layout(folder.parent).preprocess_command(table.stem))["Id"])
        if any(
            sample.Id in listed and table.stem not in valid_stores(records.get(sample.Id), states[sample])
            for sample in samples
        ):
            print(
                f"{table} is deleted: source images or levels have changed since; its recipes need 01_preprocess.py again"
            )
            table.unlink()


def all_stored(Ids: Collection[str], folder: Path) -> bool:
    """Tell whether every sample is there at every size of which `folder` has a table."""
    return all(set(Ids) <= stored_ids(table.with_suffix("")) for table in csv_files(folder))


def stored_ids(folder: Path) -> set[str]:
    names = os.listdir(folder) if folder.is_dir() else ()
    return {composed(name.removesuffix(".tif")) for name in names if name.endswith(".tif")}


def sample_table(samples: list[Sample], sides: list[int]) -> pd.DataFrame:
    """Table of all samples: Id, part (train, test, external), Target, side of the source in pixels."""
    return pd.DataFrame(
        [{"Id": s.Id, "part": s.part, "Target": s.Target, "side": side} for s, side in zip(samples, sides, strict=True)]
    )


def statistics_table(samples: list[Sample], rows: list[dict]) -> pd.DataFrame:
    """Table of one store's images: Id, side in pixels, statistics per channel (0-1), crc of the pixels."""
    return pd.DataFrame([{"Id": s.Id, **row} for s, row in zip(samples, rows, strict=True)]).round(6)


def describe(stored: Stored, work: Path) -> list[str]:
    """Say what there is now, and what is to be wondered at."""
    counts = pd.Series([sample.part for sample in stored.samples]).value_counts()
    parts = ", ".join(f"{counts[part]} {part}" for part in ("train", "test", "external") if part in counts)
    lines = [f"{parts} samples at {', '.join(stored.statistics)} px in {work / 'images'}"]
    if stored.bad:
        lines.append(
            f"warning: {len(stored.bad)} samples are left out here and in all stages (all of them in "
            f"{work / 'left_out.csv'}):\n{listing(stored.bad.values())}"
        )
    lines += [f"warning: {line}" for line in exposure.describe(stored.exposure)]
    absent = absent_classes(parse_targets([sample.Target for sample in stored.samples if sample.part == "train"]))
    if absent:
        lines.append(f"warning: {len(absent)} classes have no training sample: {', '.join(absent)}")
    return lines
