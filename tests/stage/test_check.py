"""01_preprocess.py --check as a user calls it: on a good folder, on a broken one, without packages."""

import os
import shutil

import cv2
import numpy as np
import pandas as pd

from common.artifacts.locks import Lock
from common.data.sources import looks_cut_short
from tests.conftest import write_sample

SCRIPT = "01_preprocess.py"
QUICK = ("--recipes", "demo-quick", "--n-folds", 2, "--pretrained", "none")


def test_a_good_folder_is_fine_and_nothing_is_written(run_script, small_data, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    out = run_script(
        "run_all.sh", "--check", "--data", small_data, "--work", tmp_path / "work", "--quick", "--recipes", "demo"
    ).stdout
    assert sorted(tmp_path.rglob("*")) == before
    lines = out.splitlines()
    for beginning in (
        "fine       packages",
        "fine       work folder",
        "fine       tables                 12 train samples, 3 test samples",
        "fine       images                 15 of 15 samples have four good headers (15 of 160 px)",
        "warning    labels                 25 of 28 classes have no sample",
        "fine       labels                 12 labelled",
        "fine       weights                resnet10_narrow: from random weights",
        "fine       memory, demo-quick     a batch of 8 fits",
        "fine       disk",
        "estimate   time, 01 and 02",
        "estimate   time, 04 demo-quick    ",
        "estimate   time, 05 demo-quick",
        "estimate   time, in all",
        "no check failed; warnings: 1",
    ):
        assert any(line.startswith(beginning) for line in lines), (beginning, out)


def test_all_that_is_wrong_is_told_in_one_go_with_its_cure(run_script, small_data, tmp_path):
    folder = small_data / "train_full_size"
    (folder / "train-0_green.tif").unlink()
    colour = np.zeros((160, 160, 3), dtype=np.uint8)
    (folder / "train-1_red.tif").unlink()
    cv2.imwrite(str(folder / "train-1_red.png"), colour)
    cut = folder / "train-2_blue.tif"
    cut.write_bytes(cut.read_bytes()[:20_000])
    write_sample(folder, "stray")
    for Id in range(3, 9):
        write_sample(folder, f"train-{Id}", dtype=np.uint16)
        for path in folder.glob(f"train-{Id}_*"):
            image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) >> 4
            cv2.imwrite(str(path), image, [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    work = tmp_path / "work"
    with Lock(work / "runs" / "demo-quick" / "fold0"):
        told = run_script(SCRIPT, "--check", "--data", small_data, "--work", work, *QUICK, check=False)
    assert told.returncode == 2 and told.stderr.endswith(
        "error: 1 of these will fail; fix them as described after '->'\n"
    )
    for text in (
        "fold0 is being made by ",
        "train_full_size has images of 1 Ids that are in no table, for example stray",
        "3 samples cannot be used:",
        "train: train-0_green not found",
        "train-1_red.png is a colour image",
        "train-2_blue.tif cannot be read",
        "-> fix or remove them, or leave them out with --keep-going",
        "the 16-bit files use ",
        "run_all.sh --white-level 4095",
    ):
        assert text in told.stdout, (text, told.stdout)

    shutil.rmtree(folder)
    (small_data / "test_full_size").rename(tmp_path / "elsewhere")
    told = run_script(SCRIPT, "--check", "--data", small_data, "--work", work, *QUICK, check=False)
    assert told.returncode == 2 and "no sample can be used, so nothing else can be checked" in told.stdout

    table = pd.read_csv(small_data / "train.csv", dtype=str)
    table.assign(Target=["28", *table["Target"][1:]]).to_csv(small_data / "train.csv", index=False)
    (tmp_path / "file").write_text("")
    told = run_script(
        SCRIPT, "--check", "--data", small_data, "--work", tmp_path / "file" / "work", *QUICK, check=False
    )
    assert (
        told.returncode == 2
        and "train.csv: Target must be labels 0 to 27" in told.stdout
        and "train-0: '28'" in told.stdout
    )
    assert "cannot be written (Not a directory)" in told.stdout and "are checked once the input is fixed" in told.stdout


def test_missing_packages_are_told_like_the_rest(run_script, small_data, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("""
import sys
from importlib import metadata

GONE = ("filelock", "pandas", "torch", "tqdm")
found = metadata.version

class Gone:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(name=name.split(".")[0])

def version(name):
    if name in GONE:
        raise metadata.PackageNotFoundError(name)
    return found(name)

sys.meta_path.insert(0, Gone)
metadata.version = version
""")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    told = run_script(SCRIPT, "--check", "--data", small_data, "--work", tmp_path / "work", *QUICK, check=False)
    assert told.returncode == 2 and "Traceback" not in told.stderr
    assert "pandas: expected" in told.stdout and "the package torch cannot be imported" in told.stdout


def test_flags_of_later_stages_are_for_check_only(fails, small_data):
    assert "unknown argument --n-folds" in fails(SCRIPT, "--data", small_data, "--n-folds", 2)
    assert "there is no fold 2" not in fails(SCRIPT, "--data", small_data / "nowhere", "--check", "--n-folds", 2)


def test_the_check_is_a_command_of_its_own_that_stage_01_hands_over_to(run_script, small_data, tmp_path):
    flags = ("--data", small_data / "nowhere", "--work", tmp_path / "work", *QUICK)
    own = run_script("common/check/__main__.py", *flags, check=False)
    handed = run_script(SCRIPT, *flags, "--check", check=False)
    assert own.returncode == handed.returncode == 2 and own.stderr == handed.stderr
    shown = ("before", "fine       packages", "will fail  input", "warning    and the rest")
    for told in (own.stdout, handed.stdout):
        assert [line for line in told.splitlines() if line.startswith(shown)] == [
            line for line in own.stdout.splitlines() if line.startswith(shown)
        ]
    assert "train.csv is missing" in own.stdout


def test_files_without_their_ends_are_noticed(small_data, tmp_path):
    whole = small_data / "train_full_size" / "train-0_red.tif"
    image = cv2.imread(str(whole), cv2.IMREAD_UNCHANGED)
    for suffix in (".png", ".jpg"):
        cv2.imwrite(str(tmp_path / f"whole{suffix}"), image)
    shutil.copy(whole, tmp_path / "whole.tif")
    for path in tmp_path.glob("whole.*"):
        short = tmp_path / f"short{path.suffix}"
        short.write_bytes(path.read_bytes()[:-100])
        assert not looks_cut_short(path) and looks_cut_short(short)
