"""Run every command that a message names: from nothing to a submission by following the messages."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

from common.artifacts.layout import Layout
from common.artifacts.tables import read_table
from common.data.images import checksum, read_planes
from common.errors import UserError
from tests.conftest import ROOT

TINY = ("--set", "cycle_epochs=1", "max_cycles=1", "buffers=16", "finder=off")


@pytest.fixture
def follow(monkeypatch):
    """Return a function that runs a command in this process and returns the scripts that ran, in order.

    If a command refuses and names another one, that one runs first.
    """

    def run(*arguments, depth=0):
        script, *rest = map(str, arguments)
        monkeypatch.setattr(sys, "argv", [script, *rest])
        try:
            runpy.run_path(str(ROOT / script))["main"]()
            return [script]
        except UserError as error:
            named = re.search(r"run: python (.*)", str(error))
            assert named and depth < 12, error
            done = run(
                *shlex.split(named[1]),
                *(TINY if named[1].startswith("04") and "--set" not in named[1] else ()),
                depth=depth + 1,
            )
            return done + run(*arguments, depth=depth + 1)

    return run


def test_from_nothing_to_a_submission_and_out_of_every_loss(follow, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    work = tmp_path / "it's my work"
    places = ("--data", small_data, "--work", work)
    assert [name[:2] for name in follow("03_make_folds.py", *places, "--n-folds", 2)] == ["01", "02", "03"]
    names = [name[:2] for name in follow("07_ensemble.py", *places, "--recipes", "demo-quick")]
    assert (
        names[-1] == "07" and names.count("04") == 2 and {"01", "05", "06"} <= set(names)
    )  # 01 for the size of demo-quick
    assert len(read_table(work / "submission.csv", "")) == 3

    def heal(read):
        """Return the message for a file that cannot be read, and run the command that it names."""
        with pytest.raises(UserError) as error:
            read()
        assert follow(*shlex.split(re.search(r"run: python (.*)", str(error.value))[1])) == ["01_preprocess.py"]
        return str(error.value), read()

    # A stored image is missing or damaged; a size or a table was never made.
    image = work / "images" / "96" / "train-3.tif"
    crc = checksum(read_planes(image))
    image.unlink()
    assert heal(lambda: read_planes(image, crc))[0].startswith(
        f"{image} is missing; run: python 01_preprocess.py --data {small_data} "
    )
    image.write_bytes(b"II*\0")
    with pytest.raises(UserError, match="cannot be read .*; delete it, and run: python 01_preprocess.py --data"):
        read_planes(image, crc)
    image.unlink()
    heal(lambda: read_planes(image, crc))
    for store in ("48", "by-source-16"):
        heal(lambda store=store: Layout(work).read_store(store, ["train-3", "test-2"]))
    for name, script, command in (
        ("folds.csv", "03", "04_train.py"),
        ("duplicates.csv", "02", "03_make_folds.py"),
        ("samples.csv", "01", "02_dedup.py"),
    ):
        (work / name).unlink()
        flags = ("--recipe", "demo-quick", "--show-class-weights") if command == "04_train.py" else ()
        assert [found[:2] for found in follow(command, *places, *flags)][0] == script


def test_a_copied_work_folder_is_healed_where_it_lies(follow, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    follow(
        "01_preprocess.py",
        "--data",
        small_data,
        f"--work={tmp_path / 'old'}",
        "--recipes",
        "demo-quick",
        "--limit",
        9,
        "--jobs",
        1,
    )
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    expected = [
        "python",
        "01_preprocess.py",
        "--data",
        str(small_data),
        "--recipes",
        "demo-quick",
        "--limit",
        "9",
        "--jobs",
        "1",
    ]
    assert shlex.split(Layout(tmp_path / "new").preprocess_command("96")) == [
        *expected,
        "--work",
        str(tmp_path / "new"),
    ]
    assert shlex.split(Layout(tmp_path / "new").preprocess_command("64"))[len(expected) : -2] == [
        "--set",
        "size_rule=fixed",
        "size_divisor=1",
        "image_size=64",
        "crop_size=64",
    ]


def test_keep_going_is_taken_by_run_all_and_kept_from_the_run_before(
    run_script, small_data, tmp_path, follow, capsys, monkeypatch
):
    out = run_script(
        "run_all.sh", "--data", small_data, "--work", tmp_path / "w", "--quick", "--dry-run", "--keep-going"
    ).stdout
    assert [("--keep-going" in line) for line in out.splitlines()] == [True] + [False] * 7
    (small_data / "train_full_size" / "train-3_red.tif").unlink()
    for path in (small_data / "test_full_size").iterdir():
        path.unlink()
    command = (
        "01_preprocess.py",
        "--data",
        small_data,
        "--work",
        tmp_path / "w",
        "--recipes",
        "demo-quick",
        "--jobs",
        1,
    )
    follow(*command, "--keep-going")
    capsys.readouterr()
    follow(*command)
    out = capsys.readouterr().out
    assert "are left out, as in the previous run with --keep-going" in out and "samples.csv is up to date" in out
    monkeypatch.chdir(ROOT)
    follow("07_ensemble.py", "--work", tmp_path / "w")
    assert "stage 01 left out all 3 test samples, so there is no submission to make" in capsys.readouterr().out


def test_scripts_keep_their_line_ends_on_every_system():
    names = [".ci/run", *(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.sh") if ".venv" not in path.parts)]
    found = subprocess.run(["git", "check-attr", "text", "eol", "--", *names], cwd=ROOT, capture_output=True, text=True)
    if found.returncode or not shutil.which("git"):
        pytest.skip("not a checkout of git")
    assert found.stdout.count(": eol: lf") == len(names) and "unset" not in found.stdout
