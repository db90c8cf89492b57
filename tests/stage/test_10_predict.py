"""10_predict.py as somebody with new images calls it."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from common.artifacts.predictions import load_predictions
from common.classes import CLASS_NAMES
from common.data.images import CHANNELS
from common.demo.data import make_demo_data
from common.demo.drawing import draw_sample
from tests import clothes
from tests.browser import check_page, click_heading, column, show
from tests.conftest import ROOT

SCRIPT, RECIPE = "10_predict.py", "demo-quick"


@pytest.fixture(scope="module")
def trained(run_stages, tmp_path_factory):
    """Demo data and a work folder with two networks; do not change them."""
    folder = tmp_path_factory.mktemp("trained")
    make_demo_data(folder / "data", n_train=60, n_test=10)
    settings = [part for text in ("cycle_epochs=2", "buffers=16", "min_cycle_gain=0") for part in ("--set", text)]
    places = ("--data", folder / "data", "--work", folder / "work")
    run_stages(*places, "--quick", "--recipes", "demo", *settings)
    return folder


@pytest.fixture
def predict(run_script, trained, tmp_path):
    """Return a function that predicts images into OUT, and returns the process."""

    def run(images, *more, out=None, **options):
        model = () if "--model" in more else ("--model", trained / "work")
        return run_script(SCRIPT, "--images", images, "--out", out or tmp_path / "out", *model, *more, **options)

    return run


@pytest.fixture(scope="module")
def fields():
    rng = np.random.default_rng(5)
    drawn = {Id: draw_sample(rng, labels, 200) for Id, labels in {"a": (0,), "b": (23, 25), "c": (21,)}.items()}
    return {Id: np.stack([planes[channel] for channel in CHANNELS]) for Id, planes in drawn.items()}


def probs_of(folder):
    ids, probs = load_predictions(folder / "predictions.npz", None)
    return dict(zip(ids.tolist(), probs, strict=True))


def test_a_program_can_call_its_main(trained, tmp_path, monkeypatch, capsys):
    """In one process with other work, as in a notebook; umap-learn is hidden, so that the map takes no minute."""
    images, out = trained / "data" / "test_full_size", tmp_path / "out"
    expected = probs_of_file(trained / "work" / "predictions" / RECIPE / "test.npz")
    first = next(iter(expected))
    monkeypatch.setitem(sys.modules, "umap", None)
    flags = ("--images", images, "--model", trained / "work", "--out", out, "--html", "--heat-maps", first)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, flags)])
    main = runpy.run_path(str(ROOT / SCRIPT))["main"]
    main()
    found = probs_of(out)
    assert max(np.abs(found[Id] - expected[Id]).max() for Id in expected) < 1e-6
    assert "heat map of" in (out / "predictions.html").read_text()
    capsys.readouterr()
    main()
    assert capsys.readouterr().out.count("is up to date") == 2


def test_answers_equal_those_of_stage_05_for_the_same_images(predict, trained, tmp_path):
    out = predict(trained / "data" / "test_full_size").stdout
    assert "2 networks (demo-quick folds 0,1)" in out and "taken for a whole training image" in out
    expected = probs_of_file(trained / "work" / "predictions" / RECIPE / "test.npz")
    found = probs_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert max(np.abs(found[Id] - expected[Id]).max() for Id in found) < 1e-6
    submitted = pd.read_csv(trained / "work" / "submission.csv").set_index("Id")["Predicted"]
    table = pd.read_csv(tmp_path / "out" / "predictions.csv", dtype={"predicted": str}).set_index("Id")
    for Id, names in table["predicted"].items():
        assert {CLASS_NAMES.index(name) for name in names.split("; ")} == set(map(int, submitted[Id].split()))
    assert list(table.columns[10:38]) == list(CLASS_NAMES)
    for Id, probs in expected.items():
        np.testing.assert_allclose(table.loc[Id].iloc[10:38].to_numpy(float), probs, atol=1e-6)


def probs_of_file(path):
    ids, probs = load_predictions(path, None)
    return dict(zip(ids.tolist(), probs, strict=True))


def test_one_field_in_all_clothes_has_the_same_answers(predict, fields, tmp_path):
    (tmp_path / "PNG").mkdir()
    predict(clothes.pngs(tmp_path / "PNG", fields), out=tmp_path / "PNG out")
    expected = probs_of(tmp_path / "PNG out")
    for name, write in clothes.CLOTHES.items():
        if name == "OME-Zarr":
            pytest.importorskip("zarr")
        (tmp_path / name).mkdir()
        more = ("--channels", "red=1,green=3,blue=0,yellow=2") if name == "pages" else ()
        predict(write(tmp_path / name, fields), *more, out=tmp_path / f"{name} out")
        found = probs_of(tmp_path / f"{name} out")
        assert found.keys() == expected.keys(), name
        assert max(np.abs(found[Id] - expected[Id]).max() for Id in found) < 1e-5, name


def test_what_is_written_is_what_is_documented(predict, fields, tmp_path):
    out, images = tmp_path / "out", clothes.pngs(tmp_path, fields)
    text = predict(images).stdout
    assert "classes per image" in text
    arrays = np.load(out / "predictions.npz")
    assert arrays["members"].shape == (2, 3, 28) and arrays["networks"].tolist() == [
        f"{RECIPE} fold 0",
        f"{RECIPE} fold 1",
    ]
    np.testing.assert_allclose(arrays["members"].mean(axis=0), arrays["probs"], atol=1e-6)
    assert ((arrays["calibrated"] >= 0) & (arrays["calibrated"] <= 1)).all()
    assert ((arrays["agreement"] >= 0) & (arrays["agreement"] <= 1)).all() and (arrays["unlike"] > 0).all()
    embeddings = np.load(out / "embeddings.npz")
    assert embeddings["ids"].tolist() == ["a", "b", "c"] and embeddings[f"{RECIPE} fold 1"].shape == (3, 16)
    table = pd.read_csv(out / "predictions.csv")
    assert list(table.columns[:11]) == [
        *("Id", "predicted", "flags", "agreement", "spread", "unlike"),
        *("missing", "width", "height", "pixel_size", "windows"),
    ]
    assert not (out / "parts").exists() and not (out / "bad_files.csv").exists()
    assert "is up to date" in predict(images).stdout
    Image.fromarray(fields["b"][0]).save(images / "a_red.png")
    assert "again (changed: images)" in predict(images).stdout


def test_a_larger_field_is_covered_by_windows(predict, fields, tmp_path):
    """A field of two images side by side: each window is one of the images, so nothing else is predicted."""
    wide = {"wide": np.concatenate([fields["a"], fields["b"]], axis=2)}
    for name, some in (("alone", fields), ("wide", wide), ("sized", wide)):
        (tmp_path / name).mkdir()
        if name == "sized":
            clothes.ome_tiffs(tmp_path / name, some, pixel_size=0.08 * 2048 / 200)
        else:
            clothes.pngs(tmp_path / name, some)
    flags = ("--tta", "none", "--folds", "1")
    alone = predict_into(predict, tmp_path, "alone", *flags)
    both = np.stack([alone["a"], alone["b"]])
    for name in ("wide", "sized"):
        found = predict_into(predict, tmp_path, name, *flags)["wide"]
        np.testing.assert_allclose(found, both.max(axis=0), atol=1e-5)
        found = predict_into(predict, tmp_path, name, *flags, "--windows", "mean")["wide"]
        np.testing.assert_allclose(found, both.mean(axis=0), atol=1e-5)
    table = pd.read_csv(tmp_path / "sized out" / "predictions.csv")
    assert table["windows"].tolist() == [2] and table["pixel_size"].round(4).tolist() == [0.8192]


def predict_into(predict, folder, name, *more):
    out = folder / f"{name} out"
    predict(folder / name, *more, out=out)
    return probs_of(out)


def test_a_missing_channel_is_filled_flagged_and_priced(predict, fields, tmp_path):
    text = predict(clothes.pngs(tmp_path, fields), "--missing", "yellow").stdout
    assert "3 images have no yellow channel; it is filled with a copy of red. On the demo data that costs 0.06" in text
    flags = pd.read_csv(tmp_path / "out" / "predictions.csv")["flags"]
    assert flags.str.contains("yellow missing").all() and not flags.str.contains("yellow darker").any()
    filled = probs_of(tmp_path / "out")
    copied = {Id: planes[[0, 1, 2, 0]] for Id, planes in fields.items()}
    (tmp_path / "copied").mkdir()
    predict(clothes.pngs(tmp_path / "copied", copied), out=tmp_path / "other")
    assert all(np.allclose(filled[Id], probs, atol=1e-6) for Id, probs in probs_of(tmp_path / "other").items())


def test_levels_and_their_warning_are_as_in_stage_01(predict, fields, tmp_path):
    (tmp_path / "twelve").mkdir()
    for Id, planes in fields.items():
        for channel, plane in zip(CHANNELS, planes, strict=True):
            tifffile.imwrite(tmp_path / "twelve" / f"{Id}_{channel}.tif", plane.astype(np.uint16) * 16)
    text = predict(tmp_path / "twelve").stdout
    assert "give 10_predict.py --white-level 4095" in text
    assert pd.read_csv(tmp_path / "out" / "predictions.csv")["flags"].str.contains("few grey levels").all()
    text = predict(tmp_path / "twelve", "--white-level", "4080").stdout
    assert "--white-level" not in text and "again (levels was [0, 65535], now [0, 4080])" in text


def test_bad_images_among_good_ones(predict, fails, trained, fields, tmp_path):
    images = clothes.pngs(tmp_path, fields)
    whole = (images / "b_blue.png").read_bytes()
    (images / "b_blue.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    (images / "d_red.png").write_bytes(whole)
    places = ("--images", images, "--model", trained / "work", "--out", tmp_path / "out")
    message = fails(SCRIPT, *places)
    assert "1 of 4 images cannot be used" in message and "d_green, d_blue, d_yellow not found" in message
    (images / "d_red.png").unlink()
    message = fails(SCRIPT, *places)
    assert "b_blue.png cannot be read" in message and "what was predicted is kept" in message
    text = predict(images, "--keep-going").stdout
    assert "2 of 3 images are finished already" in text and "warning: 1 of 3 images cannot be used" in text
    assert sorted(probs_of(tmp_path / "out")) == ["a", "c"]


def test_a_model_that_cannot_be_written_is_enough(predict, trained, fields, tmp_path):
    """Only the networks, their sidecars and the thresholds: no images, no predictions, no right to write."""
    gift = tmp_path / "gift"
    for path in [*(trained / "work" / "runs").rglob("best.pt*"), trained / "work" / "thresholds.json"]:
        target = gift / path.relative_to(trained / "work")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for path in [gift, *gift.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    before = {path: path.stat().st_mtime_ns for path in [gift, *gift.rglob("*")]}
    text = predict(clothes.pngs(tmp_path, fields), "--model", gift).stdout
    assert "no image is marked as unlike the training data" in text
    assert before == {path: path.stat().st_mtime_ns for path in [gift, *gift.rglob("*")]}


def test_loader_processes_several_jobs_and_batches_change_nothing(predict, fields, tmp_path):
    images = clothes.pngs(tmp_path, fields)
    predict(images, out=tmp_path / "one")
    expected = probs_of(tmp_path / "one")
    for k, more in enumerate((("--workers", "1", "--batch-size", "1"), ("--jobs", "2", "--batch-size", "2"))):
        predict(images, *more, out=tmp_path / str(k))
        found = probs_of(tmp_path / str(k))
        assert all(np.allclose(found[Id], expected[Id], atol=1e-6) for Id in expected)


def test_after_a_kill_nothing_finished_is_lost(trained, tmp_path):
    """Kill it by SIGKILL once some batches are done: the next run predicts the others only, with the same answers."""
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    clothes.pngs(images, {f"s{k}": rng.integers(0, 256, (4, 200, 200), dtype=np.uint8) for k in range(60)})
    command = [sys.executable, str(ROOT / SCRIPT), "--images", str(images), "--model", str(trained / "work")]
    command += ["--batch-size", "1", "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts, until = tmp_path / "out" / "parts", time.time() + 60

    def finished():
        return len(list(parts.glob("[!.]*.npz")))

    while finished() < 5 and process.poll() is None and time.time() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = finished()
    assert 5 <= done < 60
    again = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert f"{done} of 60 images are finished already" in again.stdout
    subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, check=True)
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()


def test_the_page_in_a_browser(predict, trained, fields, tmp_path, browser):
    """It sorts and filters, and shows heat maps; umap-learn is hidden, so that the map takes no minute."""
    images = clothes.pngs(tmp_path, fields | {"wide": np.concatenate([fields["a"], fields["b"]], axis=2)})
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "umap.py").write_text("raise ImportError")
    hidden = {**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}
    text = predict(images, "--html", "--heat-maps", "wide,a", env=hidden).stdout
    page = tmp_path / "out" / "predictions.html"
    assert f"open it in a browser: {page}" in text
    check_page(browser, page)
    show(browser, page)
    content = page.read_text()
    assert "principal components" in content and "heat map of" in content
    assert column(browser, 1, 1) == ["a", "b", "c", "wide"]
    click_heading(browser, 1, 1)
    click_heading(browser, 1, 1)
    assert column(browser, 1, 1) == ["wide", "c", "b", "a"]
    typed = """const field = document.querySelector('input[type=search]'); field.value = 'WID';
               field.dispatchEvent(new Event('input'));
               return [...field.closest('.block').querySelectorAll('tbody tr')].filter(row => !row.hidden).length"""
    assert browser.execute_script(typed) == 1
    assert predict(images, "--html", "--heat-maps", "wide,a", env=hidden).stdout.count("is up to date") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pixel-size", "0"), "expected micrometres from 0.005 to 50, found '0'"),
        (("--missing", "green"), "green, the channel of the protein, cannot be missing"),
        (("--missing", "purple"), "missing is 'purple'"),
        (("--channels", "red=0", "--missing", "red"), "--channels and --missing both name red"),
        (("--channels", "red"), "expected a different channel for each colour"),
        (("--heat-maps", "a"), "give --html too"),
        (("--folds", "7"), "fold7"),
        (("--model", "nowhere"), "nowhere is missing; expected a work folder with trained runs, or a package"),
    ],
)
def test_wrong_flags_are_refused(fails, trained, fields, tmp_path, flags, message):
    model = () if "--model" in flags else ("--model", trained / "work")
    images = clothes.pngs(tmp_path, {"a": fields["a"]})
    assert message in fails(SCRIPT, "--images", images, "--out", tmp_path / "out", *model, *flags)


def test_real_images_in_all_clothes(predict, real_data, tmp_path):
    """Real fields: a full-size TIFF and the same as 16-bit OME-TIFF; RGB-coded JPEGs."""
    folder, fields = real_data / "kaggle_tiff" / "train_full_size", {}
    for path in sorted(folder.glob("*_red.tif"))[:1]:
        Id = path.name.removesuffix("_red.tif")
        fields[Id] = np.stack([tifffile.imread(folder / f"{Id}_{channel}.tif") for channel in CHANNELS])
    (tmp_path / "ome").mkdir()
    clothes.ome_tiffs(tmp_path / "ome", fields, pixel_size=0.08 * 2048 / next(iter(fields.values())).shape[1])
    predict(tmp_path / "ome", out=tmp_path / "a")
    predict(folder, out=tmp_path / "b")
    one, other = probs_of(tmp_path / "a"), probs_of(tmp_path / "b")
    assert all(np.abs(one[Id] - other[Id]).max() < 1e-5 for Id in fields)
    text = predict(real_data / "external" / "images", out=tmp_path / "c").stdout
    assert "2 images" in text and len(probs_of(tmp_path / "c")) == 2
