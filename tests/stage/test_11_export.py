"""11_export.py as a user calls it: a work folder becomes a package, and 10_predict.py gives the same answers with it."""

import json
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest

from common.artifacts.files import read_json
from tests.conftest import ROOT, write_sample

RECIPE = "demo-quick"
OPTIONAL = all(find_spec(name) for name in ("onnx", "onnxruntime", "bioimageio"))
PLAIN = ("--no-onnx", "--no-bioimage")


@pytest.fixture(scope="module")
def work(run_script, tmp_path_factory):
    """A work folder with two trained folds and thresholds."""
    from tests import conftest

    folder = tmp_path_factory.mktemp("export")
    data = conftest.small_data.__wrapped__(folder)  # the fixture's function: this one is for the whole file
    places = ("--data", data, "--work", folder / "work")
    run_script("01_preprocess.py", *places, "--recipes", RECIPE)
    run_script("02_dedup.py", *places)
    run_script("03_make_folds.py", *places, "--n-folds", 2)
    tiny = ("--set", "cycle_epochs=1", "max_cycles=1", "buffers=16")
    run_script("04_train.py", *places, "--recipe", RECIPE, *tiny)
    run_script("05_predict_oof.py", *places, "--recipes", RECIPE)
    run_script("06_thresholds.py", *places, "--recipes", RECIPE)
    return folder / "work"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for k in range(3):
        write_sample(folder, f"new-{k}", seed=5)
    return folder


def test_folder_and_zip_file_give_the_answers_of_the_work_folder(run_script, work, images, tmp_path):
    for out in ("package", "package.zip"):
        told = run_script("11_export.py", "--model", work, "--out", tmp_path / out, *PLAIN, "--licence", "MIT").stdout
        assert (
            f"{out}: 2 networks" in told and "licence of the weights: MIT" in told and "cross-fitted macro F1" in told
        )
        again = run_script("11_export.py", "--model", work, "--out", tmp_path / out, *PLAIN, "--licence", "MIT").stdout
        assert again.count("is up to date") == 1
    answers = []
    for model in (work, tmp_path / "package", tmp_path / "package.zip"):
        out = tmp_path / "answers" / model.name
        run_script("10_predict.py", "--images", images, "--model", model, "--out", out)
        with np.load(out / "predictions.npz") as arrays:
            answers.append(arrays["probs"])
        assert (out / "predictions.csv").read_bytes() == (tmp_path / "answers/work/predictions.csv").read_bytes()
    assert len(answers[0]) == 3 and all(np.array_equal(answers[0], other) for other in answers)
    found = read_json(tmp_path / "package" / "model.json")
    assert found["licence"] == "MIT" and found["training"]["samples"] == 12 and found["name"] == RECIPE
    assert "licence `MIT`" in (tmp_path / "package" / "README.md").read_text()
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        assert archive.namelist()[0] == "model.json" and len(archive.namelist()) == 6
        assert json.loads(archive.read("model.json")) == found  # nothing depends on the form
    assert not list(tmp_path.glob(".*making")) and not list(tmp_path.glob(".*reference"))


def test_a_package_is_exported_again_with_another_licence(run_script, work, tmp_path):
    run_script("11_export.py", "--model", work, "--out", tmp_path / "a.zip", *PLAIN, "--no-reference")
    told = run_script(
        "11_export.py", "--model", tmp_path / "a.zip", "--out", tmp_path / "b", *PLAIN, "--licence", "MIT"
    )
    assert "cross-fitted macro F1" in told.stdout
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        first = json.loads(archive.read("model.json"))
    second = read_json(tmp_path / "b" / "model.json")
    same = ("members", "decision", "training", "model_digest", "name")
    assert all(first[key] == second[key] for key in same) and second["licence"] == "MIT"
    assert first["members"][0]["reference"] is None and not (tmp_path / "b" / "reference").exists()


def test_what_it_refuses(run_script, fails, work, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    assert "is no package that this stage wrote; delete it, or give another --out" in fails(
        "11_export.py", "--model", work, "--out", other, *PLAIN
    )
    assert (other / "mine.txt").read_text() == "mine" and len(list(other.iterdir())) == 1
    (tmp_path / "mine.zip").write_text("mine")
    assert "mine.zip exists" in fails("11_export.py", "--model", work, "--out", tmp_path / "mine.zip", *PLAIN)
    assert "is the model itself" in fails("11_export.py", "--model", work, "--out", work, *PLAIN)
    assert "is missing; expected a work folder" in fails("11_export.py", "--model", tmp_path / "no", "--out", other)
    assert "is neither a work folder" in fails("11_export.py", "--model", other, "--out", tmp_path / "p")
    run_script("11_export.py", "--model", work, "--out", tmp_path / "p", *PLAIN)
    message = fails("11_export.py", "--model", tmp_path / "p", "--out", tmp_path / "p", *PLAIN)
    assert "is the model itself" in message
    message = fails("11_export.py", "--model", work, "--out", tmp_path / "p", *PLAIN, "--name", "second")
    assert f"is the package of another model, {RECIPE}; delete it" in message


def test_an_earlier_package_is_replaced_and_its_files_go(run_script, work, tmp_path):
    out = tmp_path / "p"
    run_script("11_export.py", "--model", work, "--out", out, *PLAIN)
    (out / "mine.txt").write_text("mine")
    told = run_script("11_export.py", "--model", work, "--out", out, *PLAIN, "--folds", "1").stdout
    assert "making" in told and "changed: model" in told
    assert sorted(path.name for path in (out / "weights").iterdir()) == [f"{RECIPE}-fold1.safetensors"]
    assert (out / "mine.txt").read_text() == "mine"
    content = bytearray((out / "README.md").read_bytes())
    (out / "README.md").write_bytes(content + b"x")
    assert (
        "is not the file that 11_export wrote"
        in run_script("11_export.py", "--model", work, "--out", out, *PLAIN, "--folds", "1").stdout
    )
    assert (out / "README.md").read_bytes() == content


def test_a_killed_export_leaves_no_package_and_the_next_makes_it(run_script, work, tmp_path):
    out = tmp_path / "p"
    command = [sys.executable, ROOT / "11_export.py", "--model", work, "--out", out, *PLAIN]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".p.making/weights/*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_script("11_export.py", "--model", work, "--out", out, *PLAIN)
    assert "is up to date" in run_script("11_export.py", "--model", work, "--out", out, *PLAIN).stdout
    assert not list(tmp_path.glob(".*making"))


@pytest.mark.skipif(not OPTIONAL, reason="onnx, onnxruntime or bioimageio.core is not installed")
def test_onnx_and_bioimage_io(run_script, work, tmp_path):
    import onnxruntime
    from bioimageio.core import test_model

    out = tmp_path / "p"
    told = run_script("11_export.py", "--model", work, "--out", out, "--licence", "CC-BY-4.0").stdout
    assert "ONNX: model.onnx; BioImage.IO: bioimageio.yaml" in told
    assert test_model(out / "bioimageio.yaml").status == "passed"
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (found,) = session.run(None, {"images": np.load(out / "test_input.npy")})
    np.testing.assert_allclose(found, np.load(out / "test_output.npy"), atol=1e-6)
    assert "license: CC-BY-4.0" in (out / "bioimageio.yaml").read_text()
    files = read_json(out / "model.json")["files"]
    assert {"model.onnx", "bioimageio.yaml", "test_input.npy", "test_output.npy", "README.md"} <= files.keys()


@pytest.mark.skipif(not OPTIONAL, reason="onnx, onnxruntime or bioimageio.core is not installed")
def test_a_program_can_call_its_main(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "package"
    monkeypatch.setattr(sys, "argv", ["11_export.py", "--model", str(work), "--out", str(out)])
    main = runpy.run_path(str(ROOT / "11_export.py"))["main"]
    main()
    assert {"model.json", "model.onnx", "bioimageio.yaml", "README.md"} <= {path.name for path in out.iterdir()}
    capsys.readouterr()
    main()
    assert "is up to date" in capsys.readouterr().out


@pytest.mark.skipif(not OPTIONAL, reason="onnx, onnxruntime or bioimageio.core is not installed")
def test_a_licence_that_bioimage_io_does_not_know_is_refused(fails, work, tmp_path):
    message = fails("11_export.py", "--model", work, "--out", tmp_path / "p", "--licence", "My-Own-1.0")
    assert "My-Own-1.0 is not in BioImage.IO's list of SPDX identifiers" in message and "--no-bioimage" in message
    assert not (tmp_path / "p").exists()
