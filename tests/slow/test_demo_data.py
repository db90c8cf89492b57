import csv
from collections import Counter

import cv2
import numpy as np
import pytest
import tifffile

from common.classes import N_CLASSES
from common.data.images import CHANNELS
from common.demo.data import REAL_COUNTS, class_quotas, make_demo_data, plan_samples
from common.demo.drawing import PATTERNS, draw_sample
from common.errors import UserError

SMALL = {"seed": 3, "n_train": 30, "n_test": 6}


def rows(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_demo_data(folder, **SMALL, jobs=1)
    return folder


@pytest.mark.parametrize(("part", "table", "n"), [("train", "train.csv", 30), ("test", "sample_submission.csv", 6)])
def test_each_listed_sample_has_four_files_and_nothing_else_lies_there(demo, part, table, n):
    ids = [row["Id"] for row in rows(demo / table)]
    assert len(set(ids)) == n
    assert {p.name for p in (demo / f"{part}_full_size").iterdir()} == {f"{i}_{c}.tif" for i in ids for c in CHANNELS}


def test_tiffs_are_uncompressed_8_bit_and_a_sample_has_one_size(demo):
    for row in rows(demo / "train.csv"):
        sides = set()
        for colour in CHANNELS:
            with tifffile.TiffFile(demo / "train_full_size" / f"{row['Id']}_{colour}.tif") as tiff:
                page = tiff.pages.first
                assert (page.dtype, page.compression.name, page.samplesperpixel) == (np.uint8, "NONE", 1)
                sides |= set(page.shape)
        assert sides in ({256}, {384})


def test_labels_are_one_to_four_distinct_classes(demo):
    for row in rows(demo / "train.csv") + rows(demo / "external" / "external.csv"):
        labels = [int(label) for label in row["Target"].split()]
        assert 1 <= len(labels) == len(set(labels)) <= 4
        assert all(0 <= label < N_CLASSES for label in labels)


def test_predicted_is_zero_in_the_sample_submission(demo):
    assert {row["Predicted"] for row in rows(demo / "sample_submission.csv")} == {"0"}


def test_same_bytes_whatever_the_number_of_processes(demo, tmp_path):
    make_demo_data(tmp_path, **SMALL, jobs=2)
    assert contents(tmp_path) == contents(demo)


def test_another_seed_gives_other_samples():
    plans = [plan_samples(np.random.default_rng(seed), 30, 6) for seed in (0, 1)]
    assert not {s.id for s in plans[0]} & {s.id for s in plans[1]}


def test_an_interrupted_run_is_finished_and_whole_samples_are_kept(demo, tmp_path):
    make_demo_data(tmp_path, **SMALL, jobs=1)
    kept, lost = sorted((tmp_path / "train_full_size").iterdir())[::30][:2]
    (tmp_path / "train.csv").unlink()
    lost.unlink()
    before = kept.stat().st_mtime_ns
    make_demo_data(tmp_path, **SMALL, jobs=1)
    assert kept.stat().st_mtime_ns == before
    assert contents(tmp_path) == contents(demo)


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path):
    (tmp_path / "train.csv").write_text("Id,Target\nsomebodys,0\n")
    with pytest.raises(UserError, match="lists samples that are not this demo's; give the demo an empty folder"):
        make_demo_data(tmp_path, **SMALL, jobs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["train.csv"]


def test_too_few_samples_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 10 train and 2 test samples, found 3 and 6"):
        make_demo_data(tmp_path, n_train=3, n_test=6)


@pytest.mark.parametrize(("colour", "coded"), [("red", "R"), ("green", "G"), ("blue", "B"), ("yellow", "RG")])
def test_external_jpegs_hold_the_channel_in_its_planes_only(demo, colour, coded):
    for row in rows(demo / "external" / "external.csv"):
        blue, green, red = cv2.split(cv2.imread(str(demo / "external" / "images" / f"{row['Id']}_{colour}.jpg")))
        planes = {"R": red.astype(int), "G": green.astype(int), "B": blue.astype(int)}
        assert all(planes[letter].max() > 60 for letter in coded)
        assert all(planes[letter].mean() < 2 for letter in set("RGB") - set(coded))
        if colour == "yellow":
            assert np.abs(planes["R"] - planes["G"]).mean() < 2


def test_fields_of_one_antibody_share_their_labels(demo):
    targets = {}
    for row in rows(demo / "external" / "external.csv"):
        antibody, plate, well, field = row["Id"].split("_")
        targets.setdefault((antibody, plate, well), []).append(row["Target"])
    assert all(len(found) > 1 and len(set(found)) == 1 for found in targets.values())


def test_planted_duplicates_are_listed_and_look_like_their_source(demo):
    planted = rows(demo / "planted_duplicates.csv")
    assert Counter(row["part"] for row in planted) == {"train": 2, "test": 1}
    for row in planted:
        for colour in CHANNELS:
            copy = tifffile.imread(demo / f"{row['part']}_full_size" / f"{row['Id']}_{colour}.tif")
            source = tifffile.imread(demo / "train_full_size" / f"{row['duplicate_of']}_{colour}.tif")
            small = [cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA).ravel() for image in (copy, source)]
            assert not np.array_equal(copy, source)
            assert np.corrcoef(small)[0, 1] > 0.97


def test_some_planted_duplicates_have_other_labels_than_their_source():
    copies = [s for s in plan_samples(np.random.default_rng(0), 1000, 120) if s.source and s.part == "train"]
    assert len(copies) == 40
    assert sum(s.labels != s.source.labels for s in copies) == 5


def test_classes_have_a_long_tail_in_the_real_order_without_duplicates():
    originals = [s for s in plan_samples(np.random.default_rng(0), 1000, 120) if s.part == "train" and not s.source]
    counts = np.bincount([label for s in originals for label in s.labels], minlength=N_CLASSES)
    assert counts.min() >= 14
    assert counts.argmax() == REAL_COUNTS.argmax()
    quotas = class_quotas(1000)[np.argsort(REAL_COUNTS)]
    assert (np.diff(quotas) >= 0).all()


@pytest.mark.parametrize("label", range(N_CLASSES))
def test_each_class_has_a_pattern_of_its_own(label):
    drawn = draw_sample(np.random.default_rng(5), (label,), 256)["green"].astype(float)
    empty = draw_sample(np.random.default_rng(5), (), 256)["green"].astype(float)
    assert len(set(PATTERNS.values())) == N_CLASSES
    assert drawn.max() > 100 > empty.max()


def test_both_sizes_show_the_same_field():
    small, large = (draw_sample(np.random.default_rng(7), (0, 25), size) for size in (256, 384))
    for colour in CHANNELS:
        at_96 = [
            cv2.resize(planes[colour], (96, 96), interpolation=cv2.INTER_AREA).ravel() for planes in (small, large)
        ]
        assert np.corrcoef(at_96)[0, 1] > 0.9
