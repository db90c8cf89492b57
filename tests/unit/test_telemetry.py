import numpy as np
import pandas as pd

from common.classes import N_CLASSES
from common.train.losses import class_mix, sample_table, save_telemetry


def targets(*labels):
    result = np.zeros((len(labels), N_CLASSES), dtype=bool)
    for row, label in zip(result, labels, strict=True):
        row[list(label)] = True
    return result


def test_the_mix_counts_labels_of_ranked_and_kept_samples():
    mix = class_mix(3, targets([0], [0, 2], [2]), ranked=np.array([1, 1, 2]), kept=np.array([0, 1, 2]))
    assert mix[0] == {
        "epoch": 3,
        "class": "Nucleoplasm",
        "ranked": 2,
        "kept": 1,
        "share_of_ranked": 0.4,
        "share_of_kept": 0.25,
    }
    assert mix[2] == {
        "epoch": 3,
        "class": "Nucleoli",
        "ranked": 3,
        "kept": 3,
        "share_of_ranked": 0.6,
        "share_of_kept": 0.75,
    }
    assert mix[1]["share_of_kept"] == 0


def test_nothing_kept_is_no_share_of_nothing():
    assert class_mix(1, targets([0]), np.array([1]), np.array([0]))[0]["share_of_kept"] == 0


def test_copies_of_a_sample_are_one_row_and_suspects_come_first():
    table = sample_table(
        np.array(["a", "b", "b", "c", "d"]),
        targets([0], [1], [1], [2], [3]),
        ranked=np.array([4, 2, 2, 4, 0]),
        kept=np.array([4, 1, 2, 4, 0]),
        loss_sums=np.array([4.0, 1, 3, 8, 0]),
    )
    assert table.to_dict("list") == {
        "Id": ["c", "a", "b"],
        "Target": ["2", "0", "1"],
        "ranked": [4, 4, 4],
        "kept": [4, 4, 3],
        "share_kept": [1, 1, 0.75],
        "mean_loss": [2, 1, 1],
    }


def test_nothing_ranked_is_no_share_of_nothing():
    assert class_mix(1, targets([0]), np.array([0]), np.array([0]))[0]["share_of_ranked"] == 0


def test_shares_and_losses_have_four_decimals_and_times_are_whole():
    mix = class_mix(1, targets([0], [1], [1]), np.array([1, 1, 1]), np.array([1, 1, 1]))
    assert (mix[0]["share_of_ranked"], mix[1]["share_of_kept"]) == (0.3333, 0.6667)
    table = sample_table(np.array(["a"]), targets([0]), np.array([3.0]), np.array([2.0]), np.array([2.0]))
    assert table[["ranked", "kept", "share_kept", "mean_loss"]].to_numpy().tolist() == [[3, 2, 0.6667, 0.6667]]
    assert table["ranked"].dtype.kind == table["kept"].dtype.kind == "i"


def test_equal_suspects_are_in_the_order_of_their_ids(tmp_path):
    one = np.ones(3, dtype=int)
    table = sample_table(np.array(["c", "a", "b"]), targets([0], [1], [2]), one, one, np.array([1.0, 1.0, 2.0]))
    assert table["Id"].tolist() == ["b", "a", "c"]
    save_telemetry(tmp_path, class_mix(1, targets([0]), np.array([1]), np.array([1])), table)
    assert pd.read_csv(tmp_path / "hard_samples.csv")["Id"].tolist() == ["b", "a", "c"]
    assert len(pd.read_csv(tmp_path / "hard_classes.csv")) == N_CLASSES
