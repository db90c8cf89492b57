"""Stage 01's journal: what earlier runs found about each sample's source files, and which images they stored.

It has one JSON line per sample and run, appended when the sample is done, so an interrupted run loses nothing. The last
line of a sample counts.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from common.artifacts.files import naming
from common.artifacts.stage import digest
from common.data import tiff
from common.data.options import Levels
from common.data.samples import Sample
from common.process.parallel import run_parallel


def read_journal(path: Path) -> dict[str, dict]:
    """Read one record per Id; a line cut short by a kill is ignored, so that its sample is made again."""
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


@contextmanager
def appending(path: Path) -> Iterator[Callable[[dict], None]]:
    """Yield a function that appends a record to the journal, and flushes it at once."""
    with naming(path), open(path, "a", encoding="utf-8") as file:

        def append(record: dict) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        yield append


def record_of(sample: Sample, levels: Levels, content: list[int] | None) -> dict:
    """Return the journal's record of a sample whose images are stored."""
    return {
        "Id": sample.Id,
        "source": sample.state,
        "unmoved": source_state(sample, entry=False),
        "content": content,
        **({} if sample.seen is None else {"seen": sample.seen}),
        "side": sample.side,
        **levels._asdict(),
        "exposure": sample.exposure,
        "stores": sample.images,
        "raw": list(sample.raw),
    }


def recall(samples: Sequence[Sample], path: Path, levels: Levels) -> list[Sample]:
    """Return the samples with the journal's records of their current files, if made with these levels."""
    records = read_journal(path)
    return [recalled(sample, records.get(sample.Id, {}), levels) for sample in samples]


def recalled(sample: Sample, record: dict, levels: Levels) -> Sample:
    """Return a sample with a record of its files; unchanged if the record is of other files or levels."""
    if record.get("source") != sample.state or (record.get("black", 0), record.get("white")) != levels:
        return sample
    return replace(
        sample,
        side=record["side"],
        seen=record.get("seen"),
        exposure=exposure_in(record),
        images=record["stores"],
        raw=tuple(store for store in record["stores"] if store in record["raw"]),
    )


def exposure_in(record: dict) -> dict:
    """Return a record's exposure; records of earlier versions have the largest 16-bit value, or None."""
    peak = record.get("peak")
    return record.get("exposure") or {"ranges": [] if peak is None else [[0, peak]], "misplaced": {}}


# --- states of source files --------------------------------------------------------------------------------


def source_state(sample: Sample, entry: bool = True) -> str:
    """Fingerprint a sample's files by name, size and times of change, without reading them.

    Programs that copy or unpack files can set the time of their content (mtime), but not that of their entry (ctime).

    entry : whether the time of the entry counts, which new permissions or another owner change too
    """
    stats = [(path.name, path.stat()) for path in sample.files]
    return digest(
        [[name, stat.st_size, stat.st_mtime_ns, *((stat.st_ctime_ns,) if entry else ())] for name, stat in stats]
    )


def content(files: tuple[Path, ...]) -> list[int] | None:
    """Return the CRC-32 of each file's bytes; None if one cannot be read."""
    try:
        return [tiff.crc32(tiff.read_bytes(path)) for path in files]
    except OSError:
        return None


def with_states(samples: Sequence[Sample], path: Path, n_jobs: int | None) -> list[Sample]:
    """Return the samples with the state of their files.

    If only the times of their entries have changed, and not their content, the state is that in the journal. The
    journal then gets the new times, so that nothing is read twice.

    n_jobs : processes that read files; None = assume unchanged content, and neither read files nor write the journal
    """
    records = read_journal(path)
    now = [replace(sample, state=source_state(sample)) for sample in samples]
    moved = [sample for sample in now if is_moved(sample, records.get(sample.Id, {}))]
    same = {s.Id for s in moved if n_jobs is None or records[s.Id].get("seen") == s.state}
    doubtful = [sample for sample in moved if sample.Id not in same]
    if doubtful and n_jobs is not None:
        with appending(path) as append:
            for k, found in run_parallel(content, [(s.files,) for s in doubtful], n_jobs, "comparing"):
                record = records[doubtful[k].Id]
                if found == record["content"]:
                    same.add(doubtful[k].Id)
                    append(record | {"seen": doubtful[k].state})
    return [replace(s, state=records[s.Id]["source"]) if s.Id in same else s for s in now]


def is_moved(sample: Sample, record: dict) -> bool:
    """Tell whether a record is of a sample's current files, except for the times of their entries."""
    return (
        "content" in record
        and sample.state != record["source"]
        and record.get("unmoved") == source_state(sample, entry=False)
    )
