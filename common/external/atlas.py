"""The samples of a list, the files of each on the atlas's servers, and what is kept of them."""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pandas as pd

from common.artifacts.files import clear_leftovers
from common.artifacts.locks import Lock
from common.artifacts.tables import write_csv
from common.data.labels import read_labels
from common.data.sources import CHANNELS, looks_cut_short
from common.errors import UserError, listing
from common.external.fetch import Fetcher, Unavailable, Unreachable
from common.process.progress import progress

# Each release has its own host; the current one's has no number.
HOSTS = {
    "v18": "https://v18.proteinatlas.org/images/{antibody}/{field}_{colour}.jpg",
    "current": "https://images.proteinatlas.org/{antibody}/{field}_{colour}.jpg",
}
FIELDS = ("{antibody}", "{field}", "{colour}")
# The servers name the antibody by its number alone: HPA000992 is 992. All else is letters, digits and underscores.
ID = re.compile(r"(?:HPA)?0*([1-9]\d*)_(\w+)", re.ASCII)
PATIENCE = 12  # files in a row that no answer comes for, after all tries, before the download gives up


@dataclass(frozen=True)
class Job:
    """A file to download."""

    Id: str
    url: str
    path: Path


def download(
    table: Path,
    out: Path,
    host: str = "v18",
    classes: Collection[int] | None = None,
    limit: int | None = None,
    rate: float = 10,
    connections: int = 8,
) -> None:
    """Download the four images of each sample of a table into `out`, and list the complete samples in external.csv.

    host : a name of HOSTS or a pattern of URLs
    classes : only samples with at least one of these labels
    limit : only the first of them
    rate : requests a second
    Raises UserError for a bad table, and at the end if files are missing.
    """
    pattern = url_pattern(host)
    if (out / "external.csv").exists() and os.path.samefile(table, out / "external.csv"):
        raise UserError(f"{table} is the table that this command writes; keep the list elsewhere")
    samples = select(read_labels(table), classes, limit)
    jobs = [job for Id in samples["Id"] for job in jobs_of(Id, pattern, out / "images")]
    with Lock(out / "external.csv", other="--out"):
        wanted = missing_files(jobs, out / "images")
        print(f"{len(samples)} samples, {len(jobs)} files: {len(jobs) - len(wanted)} exist, {len(wanted)} to download")
        failures = fetch_all(wanted, Fetcher(rate), connections)
        write_tables(samples, failures, out)
    report(samples, failures, out)


def url_pattern(host: str) -> str:
    """Return the pattern of a host's URLs; raises UserError if it is none."""
    pattern = HOSTS.get(host, host)
    rest = pattern
    for field in FIELDS:
        rest = rest.replace(field, "")
    fine = all(field in pattern for field in FIELDS) and not {"{", "}"} & set(rest)
    if not (fine and re.match(r"https?://[\w.:-]+/", pattern, re.ASCII)):
        raise UserError(f"--host: expected {', '.join(HOSTS)} or a URL such as {HOSTS['v18']}; found {host!r}")
    return pattern


def select(samples: pd.DataFrame, classes: Collection[int] | None, limit: int | None) -> pd.DataFrame:
    """Return the samples to download; raises UserError for Ids that are not the atlas's, and if none is left."""
    other = [Id for Id in samples["Id"] if not ID.fullmatch(Id)]
    if other:
        raise UserError(
            "expected Ids of the Human Protein Atlas, <antibody>_<plate>_<well>_<field>, for example 10580_1610_C1_1; "
            f"found:\n{listing(map(repr, other))}"
        )
    if classes is not None:
        has_one = [not set(map(int, target.split())).isdisjoint(classes) for target in samples["Target"]]
        samples = samples[has_one]
    if samples.empty:
        raise UserError(f"no sample has one of the labels {', '.join(map(str, classes or ()))}")
    return samples.head(limit) if limit else samples


def jobs_of(Id: str, pattern: str, folder: Path) -> list[Job]:
    """Return the downloads of a sample's four files."""
    antibody, field = ID.fullmatch(Id).groups()  # type: ignore[union-attr] # `select` has checked it
    return [
        Job(Id, pattern.format(antibody=antibody, field=field, colour=colour), folder / f"{Id}_{colour}.jpg")
        for colour in CHANNELS
    ]


def missing_files(jobs: list[Job], folder: Path) -> list[Job]:
    """Return the downloads whose file is missing or cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    existing = set(os.listdir(folder))
    jobs_seen = progress(jobs, len(jobs), "existing files", "files")
    return [job for job in jobs_seen if job.path.name not in existing or looks_cut_short(job.path)]


def fetch_all(jobs: list[Job], fetcher: Fetcher, connections: int) -> list[tuple[Job, str]]:
    """Download files; return those that could not be had, with the reason.

    Raises UserError when the server does not answer any more.
    """
    failures, in_a_row = [], 0
    with answers(jobs, fetcher, connections) as results:
        for job, error in progress(results, len(jobs), "download", "files"):
            in_a_row = in_a_row + 1 if isinstance(error, Unreachable) else 0
            if error:
                failures.append((job, str(error)))
            if in_a_row == PATIENCE:
                raise UserError(
                    f"the last {PATIENCE} files could not be downloaded, for example {job.url} ({error}); finished "
                    "files are kept: check the network and the address, and run the same command again to resume"
                )
    return sorted(failures, key=lambda failure: failure[0].path)


@contextmanager
def answers(jobs: list[Job], fetcher: Fetcher, connections: int) -> Iterator[Iterator[tuple[Job, Unavailable | None]]]:
    """Yield the downloads as they end, each with its error, if any; leaving the `with` stops all others."""

    def fetch(job: Job) -> tuple[Job, Unavailable | None]:
        try:
            fetcher.fetch(job.url, job.path)
        except Unavailable as error:
            return job, error
        return job, None

    pool = ThreadPool(connections)
    try:
        yield pool.imap_unordered(fetch, jobs)
    finally:
        fetcher.stop()
        pool.terminate()  # does not wait for connections that hang: their threads are daemons


def write_tables(samples: pd.DataFrame, failures: list[tuple[Job, str]], out: Path) -> None:
    """Write the complete samples to external.csv, beside those of earlier lists, and the missing files."""
    complete = samples[~samples["Id"].isin({job.Id for job, _ in failures})]
    path = out / "external.csv"
    if path.exists():
        earlier = read_labels(path)
        complete = pd.concat([earlier[~earlier["Id"].isin(samples["Id"])], complete])
    if len(complete):
        write_csv(path, complete)
    else:
        path.unlink(missing_ok=True)
    rows = [(job.Id, job.path.name, job.url, reason) for job, reason in failures]
    if rows:
        write_csv(out / "missing.csv", pd.DataFrame(rows, columns=["Id", "file", "url", "reason"]))
    else:
        (out / "missing.csv").unlink(missing_ok=True)


def report(samples: pd.DataFrame, failures: list[tuple[Job, str]], out: Path) -> None:
    """Print how many samples are complete; raises UserError with the files that are missing."""
    if not failures:
        print(f"{len(samples)} of {len(samples)} samples are complete; {out / 'external.csv'} lists them for stage 01")
        return
    n_complete = len(samples) - len({job.Id for job, _ in failures})
    raise UserError(
        f"{len(failures)} files are missing (all are in {out / 'missing.csv'}):\n"
        f"{listing(f'{job.path.name}: {reason}' for job, reason in failures)}\n"
        f"{n_complete} of {len(samples)} samples are complete and in {out / 'external.csv'}: stage 01 can use them. "
        "To try the others again, run the same command"
    )
