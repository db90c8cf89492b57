"""Stage 01's work: list every sample of the input folder, check it, and store it at every size needed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from common import images
from common.artifacts import digest
from common.errors import UserError, listing
from common.labels import read_csv, read_labels
from common.parallel import run_parallel

HASH_SIZE = 128  # pixels; every sample is stored at this size too, for stage 02


@dataclass(frozen=True)
class Sample:
    """One sample of the input: its four channel files in the order of `images.CHANNELS`, and where it belongs."""
    Id: str
    part: str  # train, test or external
    Target: str
    files: tuple[Path, ...]

    @property
    def rgb_coded(self) -> bool:
        return self.part == "external"


# --- what there is -----------------------------------------------------------------------------------------

def list_samples(data: Path, limit: int | None = None) -> list[Sample]:
    """List all samples of an input folder: train, test, external.

    limit : keep this many training samples, drawn at random but always the same ones
    Raises UserError for anything wrong with the CSV files, and for missing channel files (all of them at once).
    """
    train = read_labels(data / "train.csv")
    if limit is not None and limit < len(train):
        train = train.iloc[np.sort(np.random.default_rng(0).permutation(len(train))[:limit])]
    test_folders = [images.list_files(data / "test_full_size"), images.list_files(data / "test")]
    parts = [
        ("train", train, [images.list_files(data / "train_full_size"), images.list_files(data / "train")]),
        ("test", list_test(data, test_folders), test_folders),
        ("external", *list_external(data)),
    ]
    samples, missing = [], []
    for part, frame, folders in parts:
        for row in frame.itertuples():
            files, lacking = images.channel_files(row.Id, folders)
            missing += [f"{part}: {stem}" for stem in lacking]
            samples.append(Sample(row.Id, part, row.Target, tuple(files)))
    if missing:
        raise UserError(f"{data}: {len(missing)} channel files are missing (looked for .tif, .png and .jpg in "
                        f"train_full_size, train, test_full_size, test, external):\n{listing(missing)}")
    ids = pd.Series([sample.Id for sample in samples])
    if ids.duplicated().any():
        raise UserError(f"{data}: these Ids appear in more than one of train.csv, sample_submission.csv and "
                        f"external.csv:\n{listing(ids[ids.duplicated()])}")
    return samples


def list_test(data: Path, folders: list[dict]) -> pd.DataFrame:
    """Test Ids in the order of sample_submission.csv, or without that file those of the images, sorted."""
    submission = data / "sample_submission.csv"
    if submission.is_file():
        return read_csv(submission, "Predicted").assign(Target="")
    ids = {stem.removesuffix("_green") for files in folders for stem in files if stem.endswith("_green")}
    if ids:
        print(f"{submission} is missing: the {len(ids)} samples in the test folders are taken, sorted by Id")
    return pd.DataFrame({"Id": sorted(ids), "Target": ""}, dtype=str)


def list_external(data: Path) -> tuple[pd.DataFrame, list[dict]]:
    """External labels and image folders; empty where the input has none."""
    tables = [path for path in (data / "external" / "external.csv", data / "external.csv") if path.is_file()]
    if not tables:
        return pd.DataFrame({"Id": [], "Target": []}, dtype=str), []
    return read_labels(tables[0]), [images.list_files(data / "external"), images.list_files(data / "external" / "images")]


def source_state(sample: Sample) -> str:
    """Fingerprint a sample's files by name, size and time of change, without reading them."""
    return digest([[path.name, stat.st_size, stat.st_mtime_ns] for path in sample.files for stat in (path.stat(),)])


# --- the journal: what earlier runs finished ---------------------------------------------------------------

def read_journal(path: Path) -> dict[str, dict]:
    """Read one record per Id; a line cut short by a kill is left out, so that its sample is made again."""
    records = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                records[record["Id"]] = record
            except (ValueError, KeyError, TypeError):
                continue
    return records


def done_sizes(record: dict | None, state: str, stored: dict[int, set]) -> dict[int, dict]:
    """Return size -> statistics for what is stored already and still belongs to the same source files."""
    if record is None or record["source"] != state:
        return {}
    return {int(size): values for size, values in record["sizes"].items()
            if record["Id"] in stored.get(int(size), ())}


# --- checking and making -----------------------------------------------------------------------------------

def store_sample(sample: Sample, sizes: list[int], folder: Path) -> dict[int, dict]:
    """Read a sample once and write it at each size; returns size -> statistics. Raises BadImage."""
    cv2.setNumThreads(1)
    channels = images.read_sample(sample.files, sample.rgb_coded)
    made = {}
    for size in sizes:
        planes = np.stack([images.resize(channel, size) for channel in channels])
        images.write_planes(folder / str(size) / f"{sample.Id}.tif", planes)
        made[size] = images.statistics(planes)
    return made


def attempt(function, *arguments):
    """Call `function`; a BadImage comes back as a value, so that one bad file does not end a parallel run."""
    try:
        return function(*arguments)
    except images.BadImage as error:
        return error


def refuse_bad(bad: dict[int, str], samples: list[Sample], work: Path) -> None:
    """Write bad_files.csv and raise a UserError that lists the first of them."""
    report = work / "bad_files.csv"
    rows = [{"Id": samples[i].Id, "part": samples[i].part, "reason": bad[i]} for i in sorted(bad)]
    report.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(report, index=False)
    raise UserError(f"{len(bad)} samples cannot be used (all of them in {report}):\n"
                    f"{listing(row['reason'] for row in rows)}\nmend or remove them, then run this again")


def store_all(samples: list[Sample], states: list[str], sizes_for, work: Path, n_jobs: int):
    """Check and store all samples, going on where an earlier run stopped.

    sizes_for : function of the smallest source side in pixels -> list of sizes to store
    Returns (sides of the sources in pixels, list; statistics, dict of size -> list of dict), both in the
    order of `samples`.
    """
    folder = work / "images"
    journal = folder / "journal.jsonl"
    records = read_journal(journal)
    known = {i: records[s.Id]["side"] for i, s in enumerate(samples)
             if s.Id in records and records[s.Id]["source"] == states[i]}
    new = [i for i in range(len(samples)) if i not in known]
    bad = {}
    for k, result in run_parallel(attempt, [(images.check_sample, samples[i].files, samples[i].rgb_coded) for i in new], n_jobs, "checking"):
        (bad if isinstance(result, images.BadImage) else known)[new[k]] = result
    if bad:
        refuse_bad(bad, samples, work)

    sizes = sizes_for(min(known.values()))
    stored = {size: stored_ids(folder / str(size)) for size in sizes}
    done = [done_sizes(records.get(s.Id), states[i], stored) for i, s in enumerate(samples)]
    todo = [i for i in range(len(samples)) if any(size not in done[i] for size in sizes)]
    jobs = [(store_sample, samples[i], [size for size in sizes if size not in done[i]], folder) for i in todo]
    folder.mkdir(parents=True, exist_ok=True)
    with open(journal, "a", encoding="utf-8") as file:
        for k, result in run_parallel(attempt, jobs, n_jobs, "resizing"):
            i = todo[k]
            if isinstance(result, images.BadImage):
                bad[i] = result
                continue
            done[i].update(result)
            record = {"Id": samples[i].Id, "source": states[i], "side": known[i], "sizes": done[i]}
            file.write(json.dumps(record) + "\n")
            file.flush()
    if bad:
        refuse_bad(bad, samples, work)
    return [known[i] for i in range(len(samples))], {size: [row[size] for row in done] for size in sizes}


def all_stored(samples: list[Sample], folder: Path) -> bool:
    """Tell whether every sample is there at every size of which `folder` has a table."""
    wanted = {sample.Id for sample in samples}
    return all(wanted <= stored_ids(table.with_suffix("")) for table in folder.glob("*.csv"))


def stored_ids(folder: Path) -> set[str]:
    return {name.removesuffix(".tif") for name in os.listdir(folder) if name.endswith(".tif")} if folder.is_dir() else set()


def sample_table(samples: list[Sample], sides: list[int]) -> pd.DataFrame:
    """Table of all samples: Id, part (train, test, external), Target, side of the source in pixels."""
    return pd.DataFrame([{"Id": s.Id, "part": s.part, "Target": s.Target, "side": side}
                         for s, side in zip(samples, sides, strict=True)])


def statistics_table(samples: list[Sample], rows: list[dict]) -> pd.DataFrame:
    """Table of one size's stored images: Id, mean and std per channel (0-1), crc of the pixels."""
    return pd.DataFrame([{"Id": s.Id, **row} for s, row in zip(samples, rows, strict=True)]).round(6)
