"""The HTML page: after any stage, in a browser, with hostile names, and of one sample."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from common.artifacts.files import write_json
from common.artifacts.predictions import load_predictions, save_predictions
from common.classes import CLASS_NAMES
from common.demo.data import make_demo_data
from common.report.build import collect, report_page
from common.report.inputs import duplicates
from common.report.page import render
from common.report.reader import Work
from common.report.sample import heat, sample_page
from tests.browser import check_page, click_heading, column, show

RECIPE = "demo-quick"
SECTIONS = ["overview", "data", "duplicates", "folds", "training", "predictions", "scores"]
SECTIONS += ["comparison", "errors", "submission"]  # the first of these is left out: nothing has been compared
ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def work(run_stages, tmp_path_factory):
    """A work folder of all stages on a small demo, with the page; do not change it."""
    folder = tmp_path_factory.mktemp("report")
    make_demo_data(folder / "data", n_train=60, n_test=10)
    places = ("--data", folder / "data", "--work", folder / "work")
    out = run_stages(
        *places,
        "--quick",
        "--recipes",
        "demo",
        "--set",
        "cycle_epochs=2",
        "--set",
        "buffers=16",
        "--set",
        "finder=record",
        "--set",
        "min_cycle_gain=0",
    )
    assert re.fullmatch(
        rf"08_report: \d\.\d MB, open it in a browser: {re.escape(str(folder / 'work' / 'report.html'))}",
        out.splitlines()[-1],
    )
    return folder / "work"


def sections_of(work) -> dict:
    return {section.key: section for section in collect(Work(work))}


def test_the_page_in_a_browser(work, browser):
    check_page(browser, work / "report.html")
    show(browser, work / "report.html")
    found = browser.execute_script("return [...document.querySelectorAll('main > section')].map(section => section.id)")
    assert found == SECTIONS
    assert len(browser.execute_script("return [...document.images].map(image => image.alt)")) > 40
    assert browser.execute_script("return document.querySelectorAll('.left-out-note').length") == 1

    # A click sorts numbers, the largest first; another click reverses that; text goes from A to Z.
    classes = sections_of(work)["data"].blocks[2].frame
    table = browser.execute_script("return [...document.querySelectorAll('table')].findIndex(t => t.closest('#data'))")
    click_heading(browser, table, 1)
    assert column(browser, table, 1) == [str(n) for n in sorted(classes["labelled"], reverse=True)]
    click_heading(browser, table, 1)
    assert column(browser, table, 1) == [str(n) for n in sorted(classes["labelled"])]
    click_heading(browser, table, 0)
    assert column(browser, table, 0) == sorted(classes["class"], key=str.lower)


def test_dark_readers_get_a_dark_page(work, browser):
    def colours(scheme):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        return browser.execute_script(
            "const colour = e => getComputedStyle(document.querySelector(e));"
            "return [colour('section').backgroundColor, colour('.plot text').fill]"
        )

    show(browser, work / "report.html")
    assert colours("light") == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    assert colours("dark") == ["rgb(26, 29, 33)", "rgb(232, 234, 237)"]


def test_one_sample_in_a_browser(work, run_script, browser, tmp_path):
    samples = pd.read_csv(work / "samples.csv", dtype=str)
    for part in ("train", "test", "external"):
        Id = samples["Id"][samples["part"] == part].iloc[0]
        page = tmp_path / "sample.html"
        page.write_text(sample_page(Work(work), Id), encoding="utf-8")
        check_page(browser, page)
        text = browser.execute_script("return document.querySelector('#heat').textContent")
        assert {
            "train": "which this network was not trained on",
            "test": "which no network was trained on",
            "external": "so that every network was trained on it",
        }[part] in text
        assert (f"Means over the networks of {RECIPE}, folds 0, 1." in text) == (part != "train")
        assert browser.execute_script("return document.querySelectorAll('#heat img').length") > 0
        show(browser, page)
        tops = "return [...document.querySelectorAll('#image img')].map(image => image.getBoundingClientRect().top)"
        assert len(set(browser.execute_script(tops))) == 1 and len(browser.execute_script(tops)) == 5
        labelled = browser.execute_script("return document.querySelector('#image dd').textContent")
        assert (labelled == "unknown") == (part == "test")
    run_script("08_report.py", "--work", work, "--sample", Id, "--recipe", RECIPE)
    assert (work / f"sample_{Id}.html").read_bytes() == page.read_bytes()
    message = browser.execute_script("return document.querySelector('#probabilities').textContent")
    assert "Left out: stage 05 predicts test samples and, out of fold, labelled ones; this sample is neither" in message


def test_an_empty_heat_map_says_so(work, monkeypatch):
    def nothing(work, recipe, numbers, folds, sample, choose):
        probs = np.full(28, 0.001, np.float32)
        return probs, {c: np.full((8, 8), c == 3, np.float32) for c in choose(probs)}

    monkeypatch.setattr("common.report.heat_maps.explain", nothing)
    monkeypatch.setattr(
        "common.report.sample.member_probabilities", lambda work, Id: ({}, np.eye(28)[3] + np.eye(28)[5])
    )
    Id = load_predictions(work / "predictions" / RECIPE / "test.npz", "")[0][0]
    _, gallery = heat(Work(work), Id, None).blocks
    lines = {card.lines[0]: card.lines[1:] for card in gallery.cards}
    assert lines[CLASS_NAMES[3]] == ["predicted", "probability 0.001"]
    assert lines[CLASS_NAMES[5]] == ["predicted", "probability 0.001", "empty: no evidence in the image"]


def test_after_each_stage_the_rest_is_left_out_with_what_to_run(work, tmp_path):
    def copy(*names):
        for name in names:
            for path in work.glob(name):
                target = tmp_path / path.relative_to(work)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
        return {key: section.note for key, section in sections_of(tmp_path).items() if section.note}

    missing = copy()
    assert list(missing) == SECTIONS[1:] and "samples.csv is missing; run: python 01_preprocess.py" in missing["data"]
    assert list(copy("samples.csv*", "images/*.csv")) == SECTIONS[2:]  # the images themselves are not needed
    assert "image not stored" in report_page(Work(tmp_path))
    assert "no training has begun; run: python 04_train.py" in copy("duplicate*", "folds*")["training"]
    assert list(copy("runs/*/fold0/log.jsonl")) == SECTIONS[5:]
    assert list(copy("predictions")) == ["scores", "comparison", "submission"]
    missing = copy("thresholds*")
    assert list(missing) == ["comparison", "submission"]
    assert "run: python 06_thresholds.py" in missing["comparison"] and "--compare" in missing["comparison"]


def test_the_page_says_what_is_older_and_what_is_damaged(work, tmp_path):
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    folds = pd.read_csv(tmp_path / "folds.csv", dtype=str)
    folds.iloc[::-1].to_csv(tmp_path / "folds.csv", index=False)
    ids, probs = load_predictions(tmp_path / "predictions" / RECIPE / "oof.npz", "")
    stages = Work(tmp_path)
    states = next(block for block in collect(stages)[0].blocks if block.kind == "table").frame.set_index("stage")[
        "state"
    ]
    assert states["02 dedup"] == "complete" and states["04 train"] == "from an older folds.csv: run its stage again"
    assert states["09 tables"] == "not made yet"
    save_predictions(tmp_path / "predictions" / RECIPE / "oof.npz", [f"other-{k}" for k in range(len(ids))], probs)
    (tmp_path / "duplicates.csv").write_text('Id,part\n"cut off')
    (tmp_path / "runs" / RECIPE / "fold0" / "log.jsonl").write_text('{"epoch": 1, "tr')
    notes = {key: section.note for key, section in sections_of(tmp_path).items() if section.note}
    assert "the predictions are for other samples than those of folds.csv; run: python 05" in notes["predictions"]
    assert "duplicates.csv has no column Target, which its stage writes" in notes["duplicates"]
    assert "run: python 02_dedup.py" in notes["duplicates"]
    assert "log.jsonl is damaged" in notes["training"] and "train its fold again" in notes["training"]


def test_a_training_without_an_epoch_is_none(work, tmp_path):
    shutil.copytree(work, tmp_path / "work")
    for log in (tmp_path / "work" / "runs").rglob("log.jsonl"):
        log.write_text("")
    assert report_page(Work(tmp_path / "work"))


def test_the_same_artifacts_make_the_same_page(work):
    assert report_page(Work(work)) == (work / "report.html").read_text(encoding="utf-8")


def test_names_from_files_are_never_markup(work, tmp_path, browser):
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    for kind in ("runs", "predictions"):
        (tmp_path / kind / RECIPE).rename(tmp_path / kind / ATTACK)
    found = json.loads((tmp_path / "thresholds.json").read_text()) | {
        "recipes": [ATTACK],
        "members": [{"name": ATTACK, "score_cross_fitted": 0.5, "interval": [0.4, 0.6], "leave_one_out": 0.4}],
    }
    write_json(tmp_path / "thresholds.json", found)
    log = tmp_path / "runs" / ATTACK / "fold0" / "log.jsonl"
    log.write_text(log.read_text().replace("from random weights", ATTACK.replace('"', '\\"')))
    sections = collect(Work(tmp_path))
    assert [section.key for section in sections if section.note] == ["comparison"]
    page = tmp_path / "attack.html"
    page.write_text(render(ATTACK, ATTACK, sections), encoding="utf-8")
    assert page.read_text().count("&lt;img src=x") > 10 and ATTACK not in page.read_text()
    check_page(browser, page)
    assert "Members of the ensemble" in page.read_text() and "0.40–0.60" in page.read_text()


@pytest.mark.parametrize(("table", "column"), [("samples.csv", "Id"), ("duplicate_pairs.csv", "other_Id")])
def test_hostile_ids_are_refused_in_words(work, tmp_path, table, column):
    for name in ("samples.csv", "duplicates.csv", "duplicate_pairs.csv"):
        shutil.copy(work / name, tmp_path)
    frame = pd.read_csv(tmp_path / table, dtype=str)
    frame.assign(**{column: [ATTACK, *frame[column][1:]]}).to_csv(tmp_path / table, index=False)
    page = render("", "", [duplicates(Work(tmp_path))])
    assert f"{table} has Ids that are not plain file names" in page and ATTACK not in page and "&lt;img src=x" in page


def test_mistakes(fails, work, tmp_path):
    assert "nowhere is missing; run: bash run_all.sh" in fails("08_report.py", "--work", tmp_path / "nowhere")
    assert "there is no sample 'nobody'" in fails("08_report.py", "--work", work, "--sample", "nobody")
    assert "there is no sample '../samples'" in fails("08_report.py", "--work", work, "--sample", "../samples")
