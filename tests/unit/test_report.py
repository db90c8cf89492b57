import numpy as np
import pandas as pd

from common.artifacts import write_csv
from common.classes import CLASS_NAMES
from common.report_data import co_occurrence, contact_sheet
from common.report_results import calibration, error_tables, suspects, worst
from common.work import Work, class_names


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
        {"class": "Nucleoplasm", "and": "Cytosol", "together": 2, "by chance": 3 * 2 / 4, "ratio": 2 / 1.5}]


def test_every_class_shows_a_sample_of_its_own_with_few_other_labels(tmp_path):
    work = Work(tmp_path)
    samples = pd.DataFrame({"Id": list("abc"), "part": "train", "Target": ["0 25", "0", "25 0"], "side": 9})
    write_csv(tmp_path / "samples.csv", samples)
    sheet = contact_sheet(work, targets_of((0, 25), (0,), (25, 0)), np.array(list("abc")))
    assert [(card.Id, card.lines) for card in sheet.cards] == [
        ("a", ["Cytosol", "with Nucleoplasm"]), ("b", ["Nucleoplasm", "alone"])]
    assert sheet.cards[0].images == [("", "sample a: Nucleoplasm, Cytosol")]  # its image is not stored


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

    # With the hard sampler's books both ranks count.
    book = pd.DataFrame({"Id": rows["Id"], "Target": [" ".join(map(str, np.flatnonzero(row))) for row in targets],
                         "share_kept": 0.5, "mean_loss": np.where(rows["Id"] == "s7", 9, rng.random(80))})
    write_csv(tmp_path / "runs" / "a" / "fold0" / "hard_samples.csv", book)
    (tmp_path / "runs" / "a" / "fold0" / "log.jsonl").write_text('{"epoch": 1}\n')
    table = suspects(Work(tmp_path), rows, targets, probs, probs >= 0.5)
    assert table["Id"][0] == "s7" and table["suspicion"][0] == 1 and table["predicted"][0] == "Lipid droplets"


def test_the_calibration_leaves_out_what_is_too_rare():
    probs = np.full((10, 28), 0.05)
    probs[0, 0] = 0.95
    text = calibration(np.zeros(probs.shape, dtype=bool), probs).text
    assert "100 % of all predictions are below 0.1" in text
