"""A disk that is full at each write in turn, read-only folders, vanishing input: one message, nothing half done."""

import errno
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.data import images, journal
from common.train import loop
from common.train.checkpoints import save_checkpoint
from tests.conftest import ROOT

RECIPE = "demo-quick"
STAGES = {
    "01_preprocess.py": ("--recipes", RECIPE, "--jobs", "1"),
    "02_dedup.py": ("--jobs", "1"),
    "03_make_folds.py": ("--n-folds", "2"),
    "04_train.py": ("--recipe", RECIPE, "--set", "cycle_epochs=1", "max_cycles=2", "buffers=16"),
    "05_predict_oof.py": ("--recipes", RECIPE, "--tta", "none"),
    "06_thresholds.py": ("--recipes", RECIPE),
    "07_ensemble.py": ("--recipes", RECIPE),
    "09_tables.py": ("--recipes", RECIPE, "--partial"),
    "08_report.py": (),
}


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs a stage in this process and returns its exit code and stderr."""

    def run(script, data, work):
        monkeypatch.setattr(sys, "argv", [script, "--data", str(data), "--work", str(work), *STAGES[script]])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


def assert_made(result):
    """Check that a stage succeeded; on a busy machine it may also print progress."""
    assert result[0] == 0 and "error" not in result[1], result


class Disk:
    """Replaces os.fsync: the write with the number `fails` is half done, then there is no space left."""

    def __init__(self):
        self.writes, self.fails, self.fsync = 0, 0, os.fsync

    def __call__(self, file):
        self.writes += 1
        if self.writes == self.fails:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(file)


def contents(work: Path) -> dict[str, bytes]:
    """Return the files of a work folder, except those that record times or only help to resume."""
    passing = ("journal.jsonl", "log.jsonl", "last.pt", "report.html")
    return {
        str(path.relative_to(work)): path.read_bytes()
        for path in work.rglob("*")
        if path.is_file() and path.name not in passing and not path.name.endswith((".meta.json", ".lock", ".lock.json"))
    }


def test_a_disk_that_is_full_at_each_write_of_each_stage_in_turn(call, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "EPOCH_SECONDS", 0)
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk)
    whole, work, before = tmp_path / "whole", tmp_path / "work", tmp_path / "before"
    counts = {}
    for script in STAGES:
        disk.writes, disk.fails = 0, 0
        assert_made(call(script, small_data, whole))
        counts[script] = disk.writes
    good = contents(whole)
    work.mkdir()
    for script, count in counts.items():
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(work, before)
        for fails in (
            sorted({1, 2, *range(3, count, 7), *range(count - 6, count + 1)})
            if script == "01_preprocess.py"
            else range(1, count + 1)
        ):
            shutil.rmtree(work)
            shutil.copytree(before, work)
            disk.writes, disk.fails = 0, fails
            code, error = call(script, small_data, work)
            assert code == 2 and error.count("error: ") == 1 and "Traceback" not in error, error
            assert "No space left on device" in error and ("has space" in error or "free some space" in error)
            made = contents(work)
            assert all(made[name] == good[name] for name in made if not name.endswith("best.pt")), (script, fails)
            assert not [name for name in made if ".tmp" in name]
            assert all(page.read_bytes().endswith(b"</html>") for page in work.glob("*.html"))
        disk.fails = 0
        assert_made(call(script, small_data, work))  # it resumes
    assert contents(work) == good
    assert counts["04_train.py"] > 10 and counts["05_predict_oof.py"] >= 12


@pytest.mark.parametrize("step", ["write", "flush"])
def test_a_disk_that_is_full_at_a_line_of_the_journal(call, small_data, tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "work" / "images" / "journal.jsonl"
    monkeypatch.setattr(journal, "open", lambda *_, **__: type("Full", (io.StringIO,), {step: full})(), raising=False)
    code, error = call("01_preprocess.py", small_data, tmp_path / "work")
    assert code == 2 and error.count("error: ") == 1, error
    assert (
        f"error: No space left on device: {path}; check that the folder exists, can be written and has space" in error
    )
    assert not (tmp_path / "work" / "samples.csv").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_full_within_a_checkpoint_is_told_as_such(tmp_path):
    import torch

    (tmp_path / "last.pt").write_text("old")
    (tmp_path / f".last.{os.getpid()}.tmp.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*last.pt"):
        save_checkpoint(tmp_path / "last.pt", {"model": torch.zeros(10**6)})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("last.pt", "old")]


@contextmanager
def read_only(folder: Path):
    """Make a folder read-only: by its mode, or by a mount for root, which no mode stops."""
    if os.geteuid():
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
        yield
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
        return
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("root cannot mount here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_folders_that_cannot_be_written_and_input_that_goes_away(call, small_data, tmp_path, monkeypatch):
    work = tmp_path / "work"
    for script in STAGES:
        assert_made(call(script, small_data, work))
    for script in list(STAGES)[:-1]:  # the page is made again each time
        with read_only(work), read_only(small_data):
            assert_made(call(script, small_data, work))  # up to date
        for path in work.rglob("*.meta.json"):
            if json.loads(path.read_text())["stage"] == script.removesuffix(".py"):
                path.unlink()
        before = contents(work)
        with read_only(work):  # a mode gives "Permission denied", a mount the other
            code, error = call(script, small_data, work)
        assert (
            code == 2
            and error.count("error: ") == 1
            and any(why in error for why in ("Read-only file system", "Permission denied"))
        ), error
        assert contents(work) == before
        assert_made(call(script, small_data, work))

    image = work / "images" / "96" / "train-3.tif"
    planes = image.read_bytes()
    for content in (None, planes[:-1000] + bytes(1000)):  # missing, and damaged in a way that a decoder overlooks
        image.unlink() if content is None else image.write_bytes(content)
        shutil.rmtree(work / "runs", ignore_errors=True)
        code, error = call("04_train.py", small_data, work)
        told = f"{image} is missing; run: python 01" if content is None else f"{image} cannot be read ("
        assert code == 2 and told in error and "run: python 01_preprocess.py" in error, error
        image.unlink(missing_ok=True)
        assert call("01_preprocess.py", small_data, work) == (0, "")
        assert image.read_bytes() == planes

    store, source = images.store_sample, small_data / "train_full_size" / "train-5_blue.tif"
    lost = source.read_bytes()
    monkeypatch.setattr(
        images, "store_sample", lambda sample, how: (sample.Id == "train-2" and source.unlink()) or store(sample, how)
    )
    shutil.rmtree(work)
    code, error = call("01_preprocess.py", small_data, work)
    assert code == 2 and "1 samples cannot be used" in error and f"{source} cannot be read (" in error, error
    source.write_bytes(lost)
    monkeypatch.setattr(images, "store_sample", store)
    assert call("01_preprocess.py", small_data, work) == (0, "")
