import json

import numpy as np
import pandas as pd
import pytest

from common.artifacts.files import write_json, write_text
from common.artifacts.predictions import save_predictions
from common.artifacts.stage import Record, Stage, sidecar
from common.artifacts.tables import write_csv
from common.classes import CLASS_NAMES
from common.data.exposure import WHOLE, judge
from common.errors import UserError
from common.report.build import stage_table
from common.report.inputs import co_occurrence, contact_sheet, exposure, left_out
from common.report.reader import Work, class_names
from common.report.results import calibration, error_tables, errors, few_positives, suspects, worst
from common.report.sample import place, probabilities, why_unknown


def targets_of(*labels):
    targets = np.zeros((len(labels), 28), dtype=bool)
    for row, some in enumerate(labels):
        targets[row, list(some)] = True
    return targets


def test_labels_are_read_as_names():
    assert class_names("25 0") == "Nucleoplasm, Cytosol" and class_names("") == "unknown"


def test_the_most_confident_errors_are_of_many_classes_and_samples():
    confidence = np.array([[9.0, 8, 1], [7, 0, 0], [6, 0, 0], [5, 4, 0], [0, 0, 99]])
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=bool)
    assert worst(mask, confidence) == [(0, 0), (1, 0), (3, 1)]
    assert worst(np.zeros_like(mask), confidence) == []


def test_pairs_of_classes_against_chance():
    targets = targets_of((0, 25), (0, 25), (0,), (21,))
    _, table = co_occurrence(targets, np.argsort(-targets.sum(axis=0), kind="stable"))
    assert table.frame.to_dict("records") == [
        {"class": "Nucleoplasm", "and": "Cytosol", "together": 2, "by chance": 3 * 2 / 4, "ratio": 2 / 1.5}
    ]


def test_every_class_shows_a_sample_of_its_own_with_few_other_labels(tmp_path):
    work = Work(tmp_path)
    samples = pd.DataFrame({"Id": list("abc"), "part": "train", "Target": ["0 25", "0", "25 0"], "side": 9})
    write_csv(tmp_path / "samples.csv", samples)
    sheet = contact_sheet(work, targets_of((0, 25), (0,), (25, 0)), np.array(list("abc")))
    assert [(card.Id, card.lines) for card in sheet.cards] == [
        ("a", ["Cytosol", "with Nucleoplasm"]),
        ("b", ["Nucleoplasm", "alone"]),
    ]
    assert sheet.cards[0].images == [("", "sample a: Nucleoplasm, Cytosol")]  # the image is not stored


def test_what_is_missed_and_what_is_predicted_in_its_place():
    targets, predicted = targets_of((1,), (1,), (2,)), targets_of((3,), (3, 4), (2,))
    classes, pairs = (table.frame for table in error_tables(targets, targets & ~predicted, ~targets & predicted))
    assert classes.iloc[0].to_list() == ["Nuclear membrane", 2, 2, 0]
    assert pairs.to_numpy().tolist() == [[CLASS_NAMES[1], CLASS_NAMES[3], 2], [CLASS_NAMES[1], CLASS_NAMES[4], 1]]


def test_a_wrong_label_is_the_first_suspect_however_many_labels_others_have(tmp_path):
    rng = np.random.default_rng(0)
    targets = targets_of(*[(k % 28,) if k < 60 else (k % 28, (k + 1) % 28, (k + 2) % 28) for k in range(80)])
    probs = np.where(targets, 0.7, 0.1) + rng.normal(0, 0.05, targets.shape)
    probs[7, 7], probs[7, 20] = 0.02, 0.9  # labelled 7, looks like 20
    rows = pd.DataFrame({"Id": [f"s{k}" for k in range(80)]})
    table = suspects(Work(tmp_path), rows, targets, probs, probs >= 0.5)
    assert table["Id"][0] in ("s7", *(f"s{k}" for k in range(60, 80))) and table.set_index("Id")["suspicion"]["s7"] == 1

    # With losses recorded by the hard sampler, both ranks count.
    book = pd.DataFrame(
        {
            "Id": rows["Id"],
            "Target": [" ".join(map(str, np.flatnonzero(row))) for row in targets],
            "share_kept": 0.5,
            "mean_loss": np.where(rows["Id"] == "s7", 9, rng.random(80)),
        }
    )
    write_csv(tmp_path / "runs" / "a" / "fold0" / "hard_samples.csv", book)
    (tmp_path / "runs" / "a" / "fold0" / "log.jsonl").write_text('{"epoch": 1}\n')
    table = suspects(Work(tmp_path), rows, targets, probs, probs >= 0.5)
    assert table["Id"][0] == "s7" and table["suspicion"][0] == 1 and table["predicted"][0] == "Lipid droplets"


def test_the_calibration_leaves_out_what_is_too_rare():
    probs = np.full((10, 28), 0.05)
    probs[0, 0] = 0.95
    text = calibration(np.zeros(probs.shape, dtype=bool), probs).text
    assert "100 % of all predictions are below 0.1" in text


# --- states ------------------------------------------------------------------------------------------------


def sealed(path, inputs, **more):
    """Write an artifact as its stage does."""
    stage = Stage("0x", path, {}, inputs)
    write_text(path, path.read_text() if path.is_file() else "made")
    stage.seal(Record(1, notes=more))


@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_state_is_compared_with_the_files_that_it_was_made_from(tmp_path, version):
    work, given = tmp_path / "work", tmp_path / "given" / "a.npz"
    for path in (given, work / "folds.csv"):
        write_text(path, "as it was")
    sealed(work / "thresholds.json", {"folds.csv": work / "folds.csv", "a.npz": given, "images": "a digest"})
    if version == "earlier":  # whose sidecars do not record where inputs are
        record = json.loads(sidecar(work / "thresholds.json").read_text())
        write_json(sidecar(work / "thresholds.json"), {key: value for key, value in record.items() if key != "files"})

    def state():
        return Work(work).state(work / "thresholds.json")[0]

    assert state() == "complete"
    (tmp_path / "moved").mkdir()
    for name in ("work", "given"):  # both: the path leads from one to the other
        (tmp_path / name).rename(tmp_path / "moved" / name)
    work, given = tmp_path / "moved" / "work", tmp_path / "moved" / "given" / "a.npz"
    assert state() == "complete"
    write_text(given, "another one")
    assert state() == ("from an older a.npz: run its stage again" if version == "this" else "complete")
    given.unlink()
    assert state() == (
        "complete; cannot be compared with a.npz, which can no longer be read" if version == "this" else "complete"
    )
    write_text(work / "folds.csv", "another one")
    assert state() == "from an older folds.csv: run its stage again"


def test_a_networks_predictions_are_compared_with_its_sidecar(tmp_path):
    best, oof = tmp_path / "runs" / "a" / "fold0" / "best.pt", tmp_path / "predictions" / "a" / "fold0_oof.npz"
    sealed(best, {})
    sealed(oof, {"network": best})
    assert Work(tmp_path).state(oof)[0] == "complete"
    write_text(best, "trained again")
    sealed(best, {})
    assert Work(tmp_path).state(oof)[0] == "from an older network: run its stage again"


def test_seconds_of_training_are_those_of_the_epochs_and_submissions_elsewhere_are_found(tmp_path):
    for fold in range(2):
        folder = tmp_path / "work" / "runs" / "a" / f"fold{fold}"
        write_text(
            folder / "log.jsonl", '{"epoch": 1, "seconds": 50, "valid_seconds": 1.5}\n{"epoch": 2, "seconds": 0.5}\n'
        )
        sealed(folder / "best.pt", {}, seconds=364)
    write_text(tmp_path / "fold1" / "mine.csv", "Id,Predicted\n")
    sealed(tmp_path / "fold1" / "mine.csv", {})
    write_json(
        tmp_path / "work" / "submissions.json", [str(tmp_path / "gone.csv"), str(tmp_path / "fold1" / "mine.csv")]
    )
    table = stage_table(Work(tmp_path / "work")).set_index("stage")
    assert table.loc["04 train", ["main file", "seconds"]].to_list() == ["runs/a/fold*/best.pt", 104]
    assert table.loc["07 ensemble", ["main file", "state"]].to_list() == [
        str(tmp_path / "fold1" / "mine.csv"),
        "complete",
    ]
    assert Work(tmp_path / "work").submission_file == tmp_path / "fold1" / "mine.csv"


# --- what may not be claimed -------------------------------------------------------------------------------


def small_work(folder, recipes=("a",), combine="mean", weights=(1.0,), thresholds=0.5):
    """A work folder of three labelled samples in two folds, one for training only, one held out and two of test.

    The labelled sample `b` is a copy of `a`.
    """
    work = folder / "work"
    rows = [
        ("a", "train", "0 25", 0),
        ("b", "train", "0", None),
        ("c", "train", "7", 1),
        ("x", "external", "3", -1),
        ("h", "train", "4", -2),
    ]
    table = pd.DataFrame(rows, columns=["Id", "part", "Target", "fold"])
    table = table.assign(
        side=9, near_group=table["Id"].replace("b", "a"), group=table["Id"].replace("b", "a"), kept=1, copies=1
    )
    write_csv(work / "duplicates.csv", table.assign(kept=table["fold"].notna().astype(int)).drop(columns="fold"))
    write_csv(work / "folds.csv", table.dropna().astype({"fold": int}))
    test = pd.DataFrame({"Id": ["t", "u"], "part": "test", "Target": "", "side": 9})
    write_csv(work / "samples.csv", pd.concat([table[["Id", "part", "Target", "side"]], test]))
    for k, recipe in enumerate(recipes):
        probs = np.full((2, 28), 0.25 + k / 2)
        save_predictions(work / "predictions" / recipe / "oof.npz", ["a", "c"], probs)
        save_predictions(work / "predictions" / recipe / "test.npz", ["t", "u"], probs)
    write_json(
        work / "thresholds.json",
        {"recipes": list(recipes), "combine": combine, "weights": list(weights), "thresholds": [thresholds] * 28},
    )
    return work


@pytest.mark.parametrize(
    ("Id", "fold", "words"),
    [
        ("a", 0, "in fold 0, which this network was not trained on"),
        ("b", 0, "left out as a duplicate of samples in fold 0, which this network was not trained on"),
        ("c", 1, "in fold 1, which this network was not trained on"),
        ("t", None, "a test sample, which no network was trained on"),
        ("h", None, "held out, so that no network was trained on it"),
        ("x", None, "for training only, so that every network was trained on it"),
    ],
)
def test_which_networks_may_explain_a_sample(tmp_path, Id, fold, words):
    assert place(Work(small_work(tmp_path)), Id) == (fold, words)


def test_a_sample_is_decided_as_the_submission_is_and_labels_of_test_are_unknown(tmp_path):
    work = small_work(tmp_path, ("a", "b"), "weighted", (0.8, 0.2), thresholds=0.36)  # 0.8 * 0.25 + 0.2 * 0.75 = 0.35
    write_csv(work / "submission.csv", pd.DataFrame({"Id": ["t", "u"], "Predicted": ["3", ""]}))
    facts, _, table = probabilities(Work(work), "t").blocks
    assert facts.items == {
        "labelled": "unknown",
        "predicted": "none",
        "in the submission": CLASS_NAMES[3],
        "weighted mean of": "a, b",
    }
    np.testing.assert_allclose(table.frame["together"], 0.35, atol=1e-6)
    assert (table.frame["state"] == "").all() and "labelled" not in table.text
    assert probabilities(Work(work), "u").blocks[0].items["in the submission"] == "none"
    assert probabilities(Work(work), "a").blocks[0].items["labelled"] == "Nucleoplasm, Cytosol"
    assert "this sample is neither (for training only" in probabilities(Work(work), "x").note


def test_an_id_that_is_not_there_says_why(tmp_path):
    work = small_work(tmp_path)
    samples = pd.read_csv(work / "samples.csv", keep_default_na=False)
    write_csv(work / "samples.csv", samples.assign(Id=[f"0{Id}04cd3ba-6269" for Id in samples["Id"]]))
    write_csv(
        work / "left_out.csv",
        pd.DataFrame(
            [("lost", "test", "", 2, "lost_red.png is cut short")], columns=["Id", "part", "Target", "place", "reason"]
        ),
    )
    for Id, message in (
        ("lost", "stage 01 left out the sample lost: lost_red.png is cut short"),
        ("lots", "did you mean lost?"),
        ("0C", "did you mean 0c04cd3ba-6269?"),
        ("0h04cd3ab-6269_green.png", "did you mean 0h04cd3ba-6269?"),
        ("?", "one of them is 0a04cd3ba-6269"),
    ):
        assert why_unknown(Work(work), Id).endswith(message)
    (shown,) = left_out(Work(work))
    assert shown.title == "Samples left out: 1" and shown.frame.to_numpy().tolist() == [
        ["lost", "test", "lost_red.png is cut short"]
    ]


def test_errors_are_those_of_the_thresholds_however_small(tmp_path):
    work = Work(small_work(tmp_path, thresholds=1e-7))
    targets = targets_of((0,), (0,))
    probs = np.where(targets, 0.5, 5e-8)
    work.__dict__["oof"] = (pd.DataFrame({"Id": ["a", "c"]}), targets, probs)
    facts, note, *_ = errors(work).blocks
    assert facts.items["false alarms"] == "0" and facts.items["missed labels"] == "0 of 2"
    assert note.text == "No images are stored in this work folder."


def test_scores_that_say_little_are_named():
    notes = few_positives(pd.DataFrame({"class": ["a", "b", "c", "d"], "positives": [0, 9, 10, 0]}))
    assert [note.text for note in notes] == [
        "Without a sample, so that they count as 0: a, d.",
        "With thresholds based on fewer than 10 positives: b.",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: None, None),
        (
            lambda f: write_text(f / "labels.csv", "Id,Target\nz,0\n"),
            "no longer have Ids in common; run: python 06_thresholds.py",
        ),
        (lambda f: (f / "a.npz").unlink(), "a.npz is missing"),
        (
            lambda f: write_json(
                f / "thresholds.json", json.loads((f / "thresholds.json").read_text()) | {"recipes": ["b.npz"]}
            ),
            "thresholds.json is for other files than its sidecar; run: python 06_thresholds.py",
        ),
    ],
)
def test_predictions_given_to_stage_06_are_read_where_they_lie(tmp_path, change, message):
    save_predictions(tmp_path / "a.npz", ["b", "a", "more"], np.tile([[0.2], [0.8], [0.5]], 28))
    write_text(tmp_path / "labels.csv", "Id,Target\na,0\nb,1 2\nelse,3\n")
    write_json(
        tmp_path / "thresholds.json",
        {"recipes": ["a.npz"], "combine": "mean", "weights": [1.0], "thresholds": [0.5] * 28},
    )
    sealed(
        tmp_path / "thresholds.json",
        {name: tmp_path / path for name, path in (("labels", "labels.csv"), ("a.npz", "a.npz"))},
    )
    change(tmp_path)
    if message:
        with pytest.raises(UserError, match=message):
            _ = Work(tmp_path).oof
        return
    rows, targets, probs = Work(tmp_path).oof
    assert rows["Id"].to_list() == ["a", "b"] and targets.sum(axis=1).tolist() == [1, 2]
    np.testing.assert_allclose(probs[:, 0], [0.8, 0.2], atol=1e-6)


def test_the_page_repeats_what_stage_01_warned_of(tmp_path):
    assert exposure(Work(tmp_path)) == []
    write_text(tmp_path / "samples.csv", "Id,part,Target,side\n")
    for ranges, notes in (([[0, 65535]], 0), ([[32768, 36848]], 1)):
        found = judge(["train"], [{"ranges": ranges, "misplaced": {}}], WHOLE)
        sealed(tmp_path / "samples.csv", {}, exposure=found)
        assert [note.text.split(" use ")[0] for note in exposure(Work(tmp_path))] == [
            "Warning: the 16-bit files"
        ] * notes
