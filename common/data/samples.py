"""The samples of an input folder, one record each: listed in the tables, found in the folders."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from common.artifacts.tables import check_ids
from common.data import sources
from common.data.labels import read_csv, read_labels
from common.errors import UserError, listing


@dataclass(frozen=True)
class Sample:
    """One sample and all that stage 01 knows about it. Each step adds to it; see `ingest`."""

    Id: str
    part: str  # train, test or external
    Target: str
    files: tuple[Path, ...] = ()  # of the four channels in the order of `sources.CHANNELS`
    fault: str = ""  # why it cannot be used
    state: str = ""  # of its files, see `journal.source_state`
    seen: str | None = None  # another state, in which the files were compared and found equal
    side: int | None = None  # of the source in pixels; None = not known
    exposure: dict = field(default_factory=dict)  # see `exposure.judge`
    images: dict[str, dict] = field(default_factory=dict)  # store -> statistics of the stored image
    raw: tuple[str, ...] = ()  # stores in which it is uncompressed
    lacking: tuple[str, ...] = ()  # stores for which its image is still to be made

    @property
    def rgb_coded(self) -> bool:
        return self.part == "external"


def list_samples(data: Path, limit: int | None = None) -> list[Sample]:
    """List all samples of an input folder: train, test, external. Missing files are a sample's fault.

    limit : keep this many training samples, drawn at random, but always the same ones
    Raises UserError for anything wrong with the CSV files.
    """
    train = read_labels(data / "train.csv")
    if limit is not None and limit < len(train):
        train = train.iloc[np.sort(np.random.default_rng(0).permutation(len(train))[:limit])]
    test_folders = [sources.list_files(data / "test_full_size"), sources.list_files(data / "test")]
    train_folders = [sources.list_files(data / "train_full_size"), sources.list_files(data / "train")]
    external, external_folders = list_external(data)
    samples = [
        *find_files("train", train, train_folders),
        *find_files("test", list_test(data, test_folders), test_folders),
        *find_files("external", external, external_folders),
    ]
    ids = pd.Series([sample.Id for sample in samples])
    if ids.duplicated().any():
        raise UserError(
            f"{data}: these Ids appear in more than one of train.csv, sample_submission.csv and "
            f"external.csv:\n{listing(ids[ids.duplicated()])}"
        )
    return samples


def find_files(part: str, table: pd.DataFrame, folders: Sequence[sources.Files]) -> list[Sample]:
    """Return the samples of a table with Id and Target, with their files in the folders."""
    samples = []
    for row in table.itertuples():
        files, lacking = sources.channel_files(row.Id, folders)
        fault = f"{part}: {sources.not_found(lacking, folders)}" if lacking else ""
        samples.append(Sample(row.Id, part, row.Target, tuple(files), fault))
    return samples


def list_test(data: Path, folders: list[sources.Files]) -> pd.DataFrame:
    """Return the test Ids in the order of sample_submission.csv; without that file those of the images, sorted."""
    submission = data / "sample_submission.csv"
    if submission.is_file():
        return read_csv(submission, "Predicted").assign(Target="")
    ids = {stem.removesuffix("_green") for files in folders for stem in files if stem.endswith("_green")}
    check_ids(sorted(ids), data)
    if ids:
        print(f"{submission} is missing: using the {len(ids)} samples in the test folders, sorted by Id")
    return pd.DataFrame({"Id": sorted(ids), "Target": ""}, dtype=str)


def list_external(data: Path) -> tuple[pd.DataFrame, list[sources.Files]]:
    """Return external labels and image folders; empty if the input has none."""
    tables = [path for path in (data / "external" / "external.csv", data / "external.csv") if path.is_file()]
    if not tables:
        return pd.DataFrame({"Id": [], "Target": []}, dtype=str), []
    return read_labels(tables[0]), [
        sources.list_files(data / "external"),
        sources.list_files(data / "external" / "images"),
    ]
