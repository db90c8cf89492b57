import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from common.data import duplicates
from common.data.duplicates import (
    agreement,
    choose_kept,
    connect,
    doubtful_pairs,
    duplicate_tables,
    find_pairs,
    hash_planes,
)

RNG = np.random.default_rng(0)


def random_hashes(n):
    return RNG.integers(0, 256, (n, 3, 8), dtype=np.uint8)


def brute_force(hashes, flat, thresholds):
    """Compare every pair separately, bit by bit."""
    bits = np.unpackbits(hashes, axis=2).astype(int)
    return [
        (i, j)
        for i in range(len(bits))
        for j in range(i + 1, len(bits))
        if not flat[i] and not flat[j] and all(abs(bits[i] - bits[j]).sum(axis=1) <= thresholds)
    ]


@pytest.mark.parametrize("block", [8192, 50, 7])
@pytest.mark.parametrize("thresholds", [(20, 20, 20), (30, 24, 28), (24, 30, 28), (64, 0, 64), (0, 64, 64)])
def test_pairs_equal_brute_force(thresholds, block, monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    hashes = random_hashes(120)
    hashes[60:70] = hashes[:10]
    hashes[65, 1, 0] ^= 1
    flat = np.zeros(120, dtype=bool)
    flat[[3, 80]] = True
    pairs, distances = find_pairs(hashes, flat, thresholds)
    assert [tuple(pair) for pair in pairs] == brute_force(hashes, flat, thresholds)
    assert (distances <= thresholds).all()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_where_nothing_can_match_there_are_no_pairs(n):
    pairs, distances = find_pairs(random_hashes(n), np.ones(n, dtype=bool), (64, 64, 64))
    assert pairs.shape == (0, 2) and distances.shape == (0, 3)


def test_hashes_are_imagehashs():
    planes = RNG.integers(0, 256, (4, 128, 128), dtype=np.uint8)
    hashes, flat = hash_planes(planes)
    for c in range(3):
        assert (np.unpackbits(hashes[c]).astype(bool) == imagehash.phash(Image.fromarray(planes[c])).hash.ravel()).all()
    assert not flat


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_constant_channel_never_matches(channel):
    planes = RNG.integers(0, 256, (4, 128, 128), dtype=np.uint8)
    planes[channel] = 7
    assert hash_planes(planes)[1]


def test_groups_are_connected_components():
    assert connect(6, np.array([[1, 3], [3, 4], [0, 5]])).tolist() == [0, 1, 2, 1, 1, 0]
    assert connect(3, np.empty((0, 2), dtype=int)).tolist() == [0, 1, 2]


def test_one_sample_for_each_label_set_stays():
    targets = np.zeros((5, 2), dtype=bool)
    targets[[0, 1, 3, 4], 0] = targets[2, 1] = True
    groups = np.array([0, 0, 0, 0, 4])
    assert choose_kept(groups, targets, floor=0).tolist() == [True, False, True, False, True]


def test_no_class_falls_below_the_floor():
    targets = np.ones((10, 1), dtype=bool)
    assert choose_kept(np.zeros(10), targets, floor=7).sum() == 7
    assert choose_kept(np.zeros(10), targets, floor=50).sum() == 10


def test_one_rare_class_among_common_ones_keeps_a_sample():
    targets = np.zeros((6, 2), dtype=bool)
    targets[:, 0] = targets[:3, 1] = True  # class 0 has six samples, class 1 three
    assert choose_kept(np.zeros(6), targets, floor=3).tolist() == [True, True, True, True, False, False]
    assert choose_kept(np.zeros(6), targets, floor=2).tolist() == [True, False, True, True, False, False]


@pytest.mark.parametrize(
    ("high", "flat"), [(100, True), (101, False), (102, False)]
)  # deviations of 0, 0.5 and 1 grey levels
def test_a_channel_that_varies_by_half_a_grey_level_is_not_flat(high, flat):
    planes = RNG.integers(0, 256, (4, 64, 64), dtype=np.uint8)
    planes[1], planes[1, ::2] = 100, high
    assert hash_planes(planes)[1] == flat


def test_test_samples_are_listed_and_never_grouped():
    hashes = np.repeat(random_hashes(1), 3, axis=0)
    samples = pd.DataFrame({"Id": ["a", "b", "c"], "part": ["train", "test", "external"], "Target": ["1", "", "1"]})
    duplicates, pairs = duplicate_tables(samples, hashes, np.zeros(3, dtype=bool), (12, 12, 12), floor=0)
    assert duplicates[["Id", "group", "kept"]].values.tolist() == [["a", "a", 1], ["c", "a", 0]]
    assert pairs[["Id", "other_Id", "agreement"]].values.tolist() == [
        ["a", "b", ""],
        ["a", "c", "1.00"],
        ["b", "c", ""],
    ]


def test_a_test_sample_joins_no_labelled_ones():
    hashes = random_hashes(4)
    hashes[2:] = hashes[0]  # two test samples equal the first one
    samples = pd.DataFrame(
        {"Id": list("abcd"), "part": ["train", "train", "test", "test"], "Target": ["1", "1", "", ""]}
    )
    duplicates, pairs = duplicate_tables(samples, hashes, np.zeros(4, dtype=bool), (5, 5, 5), floor=0)
    assert duplicates[["Id", "group", "kept"]].values.tolist() == [["a", "a", 1], ["b", "b", 1]]
    assert pairs[["Id", "other_Id"]].values.tolist() == [["a", "c"], ["a", "d"], ["c", "d"]]


def test_fields_of_one_antibody_are_a_group_but_do_not_replace_each_other():
    samples = pd.DataFrame(
        {"Id": ["a", "77_1_A_1", "77_2_B_9", "8_1_A_1"], "part": ["train", *["external"] * 3], "Target": "1"}
    )
    hashes = random_hashes(4)
    hashes[2] = hashes[0]  # the competition has one of the antibody's fields
    flat = np.zeros(4, dtype=bool)
    table, pairs = duplicate_tables(samples, hashes, flat, (12, 12, 12), floor=0)
    assert table["group"].tolist() == ["a", "a", "a", "8_1_A_1"] and table["kept"].tolist() == [1, 1, 0, 1]
    assert table["near_group"].tolist() == ["a", "77_1_A_1", "a", "8_1_A_1"]
    apart, _ = duplicate_tables(samples, hashes, flat, (12, 12, 12), floor=0, by_antibody=False)
    assert apart["group"].tolist() == table["near_group"].tolist()


def test_labels_agree_by_what_both_have():
    a, b = np.zeros((3, 4), dtype=bool), np.zeros((3, 4), dtype=bool)
    a[0, :2] = b[0, :2] = a[1, 0] = b[1, 1] = a[2, :3] = b[2, 2:] = True
    assert agreement(a, b).tolist() == [1, 0, 0.25]
    assert agreement(a & False, b & False).tolist() == [0, 0, 0]


def test_doubtful_pairs_are_those_just_outside():
    hashes = np.zeros((3, 3, 8), dtype=np.uint8)
    hashes[1, 1, 0] = 0b1111  # 4 bits from the first
    hashes[2, 1, 0] = 0b1111_1111  # 8 bits from the first, 4 from the second
    samples = pd.DataFrame({"Id": list("abc"), "part": "train", "Target": "0"})
    pairs = doubtful_pairs(samples, hashes, np.zeros(3, dtype=bool), (3, 3, 3), beyond=3, n=9)
    assert pairs[["Id", "other_Id", "green"]].values.tolist() == [["a", "b", 4], ["b", "c", 4]]
    flat = np.zeros(3, dtype=bool)
    assert doubtful_pairs(samples, hashes, flat, (3, 3, 3), beyond=3, n=1)["other_Id"].tolist() == ["b"]
    assert doubtful_pairs(samples, hashes, flat, (3, 4, 3), beyond=3, n=9).empty  # 4 is within, 8 is one bit too far
    nearest = doubtful_pairs(samples, hashes, flat, (3, 3, 3), beyond=5, n=9)
    assert nearest[["Id", "other_Id", "green"]].values.tolist() == [["a", "b", 4], ["b", "c", 4], ["a", "c", 8]]


def test_a_pair_is_described_by_its_parts_its_distances_and_its_labels():
    hashes = np.zeros((2, 3, 8), dtype=np.uint8)
    hashes[1, :, 0] = [0b1, 0b11, 0b111]
    samples = pd.DataFrame({"Id": ["a", "b"], "part": ["train", "external"], "Target": ["1 2", "2 3 4"]})
    _, pairs = duplicate_tables(samples, hashes, np.zeros(2, dtype=bool), (3, 3, 3), floor=0)
    assert pairs.to_dict("records") == [
        {
            "Id": "a",
            "part": "train",
            "other_Id": "b",
            "other_part": "external",
            "red": 1,
            "green": 2,
            "blue": 3,
            "Target": "1 2",
            "other_Target": "2 3 4",
            "agreement": "0.25",
        }
    ]
