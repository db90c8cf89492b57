"""What stage 01 knows of its input: which changes of a file's entry are changes of its content."""

import os
import shutil

import numpy as np
import pytest
import tifffile

from common.artifacts.files import write_text
from common.artifacts.stage import Record, Stage
from common.data.exposure import WHOLE
from common.data.images import CHANNELS
from common.data.ingest import Sample, kept_going, known_states, preprocess_stage, refuse_bad, source_state, store_all
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
    return store_all(samples, known_states(samples, folder / "work", 1), {}, recipes_of(stores), folder / "work", 1)


def journal(folder) -> list[str]:
    return (folder / "work" / "images" / "journal.jsonl").read_text().splitlines()


def made(folder) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "work").rglob("*.tif")}


def test_other_rights_or_owners_change_nothing_and_are_looked_at_once(stored, tmp_path):
    before, states, images = journal(tmp_path), known_states(stored, tmp_path / "work", 1), made(tmp_path)
    assert len(before) == 2
    for path in stored[0].files:
        path.chmod(0o444)
    assert source_state(stored[0]) != states[stored[0]]
    assert (
        known_states(stored, tmp_path / "work", None) == states and journal(tmp_path) == before
    )  # --check reads and writes nothing
    assert known_states(stored, tmp_path / "work", 1) == states and len(journal(tmp_path)) == 3
    assert known_states(stored, tmp_path / "work", 1) == states and len(journal(tmp_path)) == 3
    store(stored, tmp_path)
    assert made(tmp_path) == images and len(journal(tmp_path)) == 3
    store(stored, tmp_path, ("64", "32"))  # another size: what was noted stays known
    assert known_states(stored, tmp_path / "work", 1) == states and len(journal(tmp_path)) == 5


def test_other_content_of_the_same_size_and_time_is_noticed(stored, tmp_path):
    path, states, images = stored[1].files[2], known_states(stored, tmp_path / "work", 1), made(tmp_path)
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    now = known_states(stored, tmp_path / "work", 1)
    assert now[stored[0]] == states[stored[0]] and now[stored[1]] == source_state(stored[1]) != states[stored[1]]
    store(stored, tmp_path)
    assert {name for name, time in made(tmp_path).items() if time != images[name]} == {"b.tif"}


def test_a_copy_with_its_times_is_the_same_and_a_touched_file_is_not(stored, tmp_path):
    states, path = known_states(stored, tmp_path / "work", 1), stored[0].files[0]
    shutil.copy2(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    assert known_states(stored, tmp_path / "work", 1) == states
    os.utime(path)
    assert known_states(stored, tmp_path / "work", 1)[stored[0]] == source_state(stored[0])


def test_a_file_that_can_no_longer_be_read_is_a_changed_one(stored, tmp_path, monkeypatch):
    states = known_states(stored, tmp_path / "work", 1)
    stored[0].files[0].chmod(0o444)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("common.data.ingest.tiff.read_bytes", refused)
    assert known_states(stored, tmp_path / "work", 1)[stored[0]] != states[stored[0]]


def test_a_journal_of_an_older_version_is_read_as_before(stored, tmp_path):
    path = tmp_path / "work" / "images" / "journal.jsonl"
    write_text(path, "".join(line.replace('"content"', '"other"') + "\n" for line in journal(tmp_path)))
    assert known_states(stored, tmp_path / "work", 1) == {sample: source_state(sample) for sample in stored}
    stored[0].files[0].chmod(0o444)
    assert known_states(stored, tmp_path / "work", 1)[stored[0]] == source_state(stored[0])


@pytest.mark.parametrize("keep_going", [True, False])
def test_what_the_run_before_was_to_leave_out_is_known(tmp_path, keep_going):
    assert not kept_going(tmp_path)
    stage = preprocess_stage(tmp_path, [Sample("a", "train", "0", ())], {}, ["128"], WHOLE, keep_going)
    write_text(stage.artifact, "Id\n")
    stage.seal(Record(1))
    assert isinstance(stage, Stage) and kept_going(tmp_path) is keep_going


def test_where_no_test_sample_has_images_the_message_says_what_follows(tmp_path):
    train, test = Sample("a", "train", "0", ()), Sample("b", "test", "", ())
    for bad, told in (({train: "x", test: "y"}, True), ({train: "x"}, False)):
        with pytest.raises(UserError) as error:
            refuse_bad(bad, [train, test], tmp_path / "bad.csv")
        assert str(error.value).endswith(
            "--keep-going there is no submission" if told else "leave them out with --keep-going"
        )
