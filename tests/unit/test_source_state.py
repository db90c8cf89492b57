"""The state of stage 01's input: which changes of a file's entry are changes of its content."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tifffile

from common.artifacts.files import write_text
from common.artifacts.stage import Record, Stage
from common.data import ingest
from common.data.images import CHANNELS
from common.data.ingest import Plan, kept_going, preprocess_stage, refuse_bad
from common.data.journal import source_state, with_states
from common.data.options import IngestOptions
from common.data.samples import Sample
from common.errors import UserError
from tests.unit.test_preprocess import recipes_of


@pytest.fixture
def stored(tmp_path):
    """Two samples of 64 px that stage 01 has stored."""
    samples = []
    for Id in ("a", "b"):
        files = tuple(tmp_path / f"{Id}_{channel}.tif" for channel in CHANNELS)
        for path in files:
            tifffile.imwrite(path, np.random.default_rng(len(samples)).integers(0, 256, (64, 64), dtype=np.uint8))
        samples.append(Sample(Id, "train", "0", files))
    store(samples, tmp_path)
    return samples


def store(samples, folder, stores=("64",)):
    plan = Plan(folder / "work", IngestOptions(recipes_of(stores)), [])
    plan = replace(plan, samples=with_states(samples, plan.journal, 1))
    return ingest.store(ingest.check(plan, 1), 1)


def states_of(samples, folder, n_jobs=1) -> list[str]:
    """Return stage 01's states of the samples' files."""
    return [sample.state for sample in with_states(samples, folder / "work" / "images" / "journal.jsonl", n_jobs)]


def journal(folder) -> list[str]:
    return (folder / "work" / "images" / "journal.jsonl").read_text().splitlines()


def made(folder) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "work").rglob("*.tif")}


def test_other_rights_or_owners_change_nothing_and_are_looked_at_once(stored, tmp_path):
    before, states, images = journal(tmp_path), states_of(stored, tmp_path), made(tmp_path)
    assert len(before) == 2
    for path in stored[0].files:
        path.chmod(0o444)
    assert source_state(stored[0]) != states[0]
    assert (
        states_of(stored, tmp_path, None) == states and journal(tmp_path) == before
    )  # --check reads and writes nothing
    assert states_of(stored, tmp_path) == states and len(journal(tmp_path)) == 3
    assert states_of(stored, tmp_path) == states and len(journal(tmp_path)) == 3
    store(stored, tmp_path)
    assert made(tmp_path) == images and len(journal(tmp_path)) == 3
    store(stored, tmp_path, ("64", "32"))  # another size: recorded states are kept
    assert states_of(stored, tmp_path) == states and len(journal(tmp_path)) == 5


def test_other_content_of_the_same_size_and_time_is_noticed(stored, tmp_path):
    path, states, images = stored[1].files[2], states_of(stored, tmp_path), made(tmp_path)
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    now = states_of(stored, tmp_path)
    assert now[0] == states[0] and now[1] == source_state(stored[1]) != states[1]
    store(stored, tmp_path)
    assert {name for name, time in made(tmp_path).items() if time != images[name]} == {"b.tif"}


def test_a_copy_with_its_times_is_the_same_and_a_touched_file_is_not(stored, tmp_path):
    states, path = states_of(stored, tmp_path), stored[0].files[0]
    shutil.copy2(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    assert states_of(stored, tmp_path) == states
    os.utime(path)
    assert states_of(stored, tmp_path)[0] == source_state(stored[0])


def test_a_file_that_can_no_longer_be_read_is_a_changed_one(stored, tmp_path, monkeypatch):
    states = states_of(stored, tmp_path)
    stored[0].files[0].chmod(0o444)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("common.data.journal.tiff.read_bytes", refused)
    assert states_of(stored, tmp_path)[0] != states[0]


def test_a_journal_of_an_older_version_is_read_as_before(stored, tmp_path):
    path = tmp_path / "work" / "images" / "journal.jsonl"
    write_text(path, "".join(line.replace('"content"', '"other"') + "\n" for line in journal(tmp_path)))
    assert states_of(stored, tmp_path) == [source_state(sample) for sample in stored]
    stored[0].files[0].chmod(0o444)
    assert states_of(stored, tmp_path)[0] == source_state(stored[0])


@pytest.mark.parametrize("keep_going", [True, False])
def test_what_the_run_before_was_to_leave_out_is_known(tmp_path, keep_going):
    assert not kept_going(tmp_path)
    stage = preprocess_stage(
        tmp_path, Plan(tmp_path, IngestOptions({}, keep_going=keep_going), [Sample("a", "train", "0")])
    )
    write_text(stage.artifact, "Id\n")
    stage.seal(Record(1))
    assert isinstance(stage, Stage) and kept_going(tmp_path) is keep_going


def test_where_no_test_sample_has_images_the_message_says_what_follows(tmp_path):
    train = Sample("a", "train", "0", fault="x")
    for fault, told in (("y", True), ("", False)):
        with pytest.raises(UserError) as error:
            refuse_bad([train, Sample("b", "test", "", fault=fault)], tmp_path / "bad.csv")
        assert str(error.value).endswith(
            "--keep-going there is no submission" if told else "leave them out with --keep-going"
        )
