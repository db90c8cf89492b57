import json
import re
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from common.data.exposure import exposure_warning
from common.data.images import CHANNELS, read_planes
from tests.conftest import write_sample

SCRIPT = "01_preprocess.py"


@pytest.fixture
def make(run_script, tmp_path):
    def run(data, *more):
        return run_script(SCRIPT, "--data", data, "--work", tmp_path / "work", "--recipes", "demo-quick", *more).stdout

    return run


@pytest.fixture
def refuses(fails, tmp_path):
    def run(data, *more):
        return fails(SCRIPT, "--data", data, "--work", tmp_path / "work", "--recipes", "demo-quick", *more)

    return run


def replace_csv(data, text, name="train.csv"):
    (data / name).write_text(text)


def test_every_sample_is_stored_at_every_size(make, small_data, tmp_path):
    out = make(small_data, "--jobs", "2")
    assert "12 train, 3 test samples at 96, 128 px" in out
    assert "25 classes have no training sample: Nuclear membrane" in out
    samples = pd.read_csv(tmp_path / "work" / "samples.csv", dtype=str, keep_default_na=False)
    assert list(samples.columns) == ["Id", "part", "Target", "side"] and len(samples) == 15
    assert list(samples["Id"][12:]) == ["test-2", "test-0", "test-1"]
    for size in (96, 128):
        table = pd.read_csv(tmp_path / "work" / "images" / f"{size}.csv")
        assert len(table) == 15 and {"mean_red", "std_yellow", "crc"} <= set(table.columns)
        assert read_planes(tmp_path / "work" / "images" / str(size) / "test-2.tif").shape == (4, size, size)


def test_planes_are_the_area_means_in_order(make, small_data, tmp_path):
    make(small_data)
    planes = read_planes(tmp_path / "work" / "images" / "96" / "train-0.tif")
    for plane, channel in zip(planes, CHANNELS, strict=True):
        source = tifffile.imread(small_data / "train_full_size" / f"train-0_{channel}.tif")
        np.testing.assert_array_equal(plane, cv2.resize(source, (96, 96), interpolation=cv2.INTER_AREA))


def test_a_second_run_does_nothing(make, small_data, tmp_path):
    make(small_data)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*")}
    assert "up to date" in make(small_data)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*")} == before


def test_only_a_changed_sample_is_made_again(make, small_data, tmp_path):
    make(small_data)
    images = tmp_path / "work" / "images" / "96"
    before = {p.name: p.stat().st_mtime_ns for p in images.iterdir()}
    write_sample(small_data / "train_full_size", "train-3", size=240, seed=9)
    assert "changed: image files" in make(small_data)
    after = {p.name: p.stat().st_mtime_ns for p in images.iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["train-3.tif"]
    sides = pd.read_csv(tmp_path / "work" / "samples.csv").set_index("Id")["side"]
    assert sides["train-3"] == 240 and (sides.drop("train-3") == 160).all()


def test_an_interrupted_run_repeats_only_what_was_not_finished(make, small_data, tmp_path):
    make(small_data)
    work = tmp_path / "work"
    journal = work / "images" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])  # like after a kill in the middle of a line
    (work / "samples.csv.meta.json").unlink()
    finished = {json.loads(line)["Id"] for line in lines[:7]}
    before = {p.stem: p.stat().st_mtime_ns for p in (work / "images" / "96").iterdir()}
    make(small_data)
    after = {p.stem: p.stat().st_mtime_ns for p in (work / "images" / "96").iterdir()}
    assert {Id for Id in before if before[Id] == after[Id]} == finished


def test_a_deleted_image_is_made_again(make, small_data, tmp_path):
    make(small_data)
    image = tmp_path / "work" / "images" / "96" / "train-3.tif"
    image.unlink()
    make(small_data)
    assert image.is_file()


def test_going_to_and_fro_between_sizes_makes_nothing_twice_and_keeps_nothing_stale(make, small_data, tmp_path):
    images = tmp_path / "work" / "images"
    make(small_data)
    before = {path: path.stat().st_mtime_ns for path in (images / "96").iterdir()}
    make(small_data, "--set", "image_size=800")
    make(small_data)
    assert {path: path.stat().st_mtime_ns for path in (images / "96").iterdir()} == before
    write_sample(small_data / "train_full_size", "train-3", seed=9)
    assert f"{images}/96.csv is deleted: source images or levels have changed since" in make(
        small_data, "--set", "image_size=800"
    )
    make(small_data)
    changed = [path.name for path in (images / "96").iterdir() if before[path] != path.stat().st_mtime_ns]
    assert changed == ["train-3.tif"]


def test_the_work_folder_may_not_be_in_the_data(fails, small_data):
    for work in (small_data, small_data / "work"):
        assert f"--work {work} is in --data {small_data}, which is never written to" in fails(
            SCRIPT, "--data", small_data, "--work", work
        )


def test_what_a_killed_run_left_half_written_is_not_taken_for_a_table(make, run_script, small_data, tmp_path):
    make(small_data)
    images = tmp_path / "work" / "images"
    (images / ".128.4242.tmp.csv").write_text("Id,si")
    assert "is up to date" in make(small_data)
    assert "is up to date" in make(small_data)  # its record still exists
    assert "making" not in make(small_data)
    run_script("08_report.py", "--data", small_data, "--work", tmp_path / "work")


def test_the_input_folder_may_be_read_only(make, small_data):
    def listing():
        return {p: p.stat().st_mtime_ns for p in small_data.rglob("*")}

    before = listing()
    make(small_data)
    assert listing() == before


def test_16_bit_tiff_is_scaled_and_not_clipped(make, small_data, tmp_path):
    write_sample(small_data / "train_full_size", "train-0", dtype=np.uint16)
    make(small_data)
    plane = read_planes(tmp_path / "work" / "images" / "96" / "train-0.tif")[1]
    source = tifffile.imread(small_data / "train_full_size" / "train-0_green.tif") / 257
    np.testing.assert_allclose(plane.mean(), source.mean(), atol=0.5)


def test_png_folders_are_used_where_there_is_no_tiff(make, small_data, tmp_path):
    for part in ("train", "test"):
        (small_data / part).mkdir()
        for path in (small_data / f"{part}_full_size").iterdir():
            Image.fromarray(tifffile.imread(path)).save(small_data / part / f"{path.stem}.png")
        shutil.rmtree(small_data / f"{part}_full_size")
    make(small_data)
    assert len(list((tmp_path / "work" / "images" / "96").iterdir())) == 15


def test_external_images_give_their_planes(make, small_data, tmp_path):
    folder = small_data / "external" / "images"
    folder.mkdir(parents=True)
    colours = {"red": (200, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 100), "yellow": (80, 80, 0)}
    for channel, colour in colours.items():
        Image.new("RGB", (160, 160), colour).save(folder / f"11088_89_B5_1_{channel}.jpg", quality=95)
    (small_data / "external" / "external.csv").write_text("Id,Target\n11088_89_B5_1,6\n")
    assert "1 external" in make(small_data)
    planes = read_planes(tmp_path / "work" / "images" / "96" / "11088_89_B5_1.tif")
    np.testing.assert_allclose(planes.mean(axis=(1, 2)), [200, 150, 100, 80], atol=2)


def test_a_small_source_is_never_enlarged(run_script, small_data, tmp_path):
    out = run_script(SCRIPT, "--data", small_data, "--work", tmp_path / "work").stdout
    assert "resnet50 uses 160 px with crops of 96 instead of 768 and 512; nothing is enlarged" in out
    assert sorted(p.name for p in (tmp_path / "work" / "images").glob("*.csv")) == ["128.csv", "160.csv"]


def test_one_small_image_is_refused_left_out_or_enlarged_and_changes_no_other(
    make, refuses, run_script, small_data, tmp_path
):
    make(small_data)
    images = tmp_path / "work" / "images" / "96"
    before = {path.name: path.read_bytes() for path in images.iterdir() if path.stem != "train-5"}
    write_sample(small_data / "train_full_size", "train-5", size=64)
    message = refuses(small_data)
    assert (
        "1 samples cannot be used" in message
        and "train: train-5 has 64 px, fewer than the 96 px of demo-quick" in message
    )
    smaller = "image_size=64 crop_size=32 size_divisor=1"
    assert f"enlarge=true, or use all at the size of the smallest with --set {smaller} (in" in message
    told = run_script(
        SCRIPT,
        "--check",
        "--data",
        small_data,
        "--work",
        tmp_path / "none",
        "--recipes",
        "demo-quick",
        "--pretrained",
        "none",
        check=False,
    )
    assert told.returncode == 2 and "train-5 has 64 px" in told.stdout and smaller in told.stdout

    assert "1 samples are left out" in make(small_data, "--keep-going")
    assert pd.read_csv(tmp_path / "work" / "left_out.csv")["Id"].tolist() == ["train-5"]
    assert {path.name: path.read_bytes() for path in images.iterdir() if path.stem != "train-5"} == before

    assert "12 train, 3 test samples at 64, 96 px" in make(small_data, "--set", "enlarge=true")
    assert read_planes(images / "train-5.tif").shape == (4, 96, 96)
    assert {path.name: path.read_bytes() for path in images.iterdir() if path.stem != "train-5"} == before


def test_a_limit_keeps_the_same_samples_each_time(make, small_data, tmp_path):
    make(small_data, "--limit", "5")
    first = (tmp_path / "work" / "samples.csv").read_text()
    make(small_data)
    make(small_data, "--limit", "5")
    assert (tmp_path / "work" / "samples.csv").read_text() == first
    assert first.count(",train,") == 5 and first.count(",test,") == 3


def test_shares_of_black_and_saturated_pixels_are_counted(make, small_data, tmp_path):
    for channel in CHANNELS:
        plane = np.full((160, 160), 100, np.uint8)
        plane[:40], plane[40:60] = 0, 255  # a quarter and an eighth
        tifffile.imwrite(small_data / "train_full_size" / f"train-0_{channel}.tif", plane)
    make(small_data)
    row = pd.read_csv(tmp_path / "work" / "images" / "96.csv").set_index("Id").loc["train-0"]
    assert row["zeros_green"] == pytest.approx(0.25) and row["saturated_yellow"] == pytest.approx(0.125)


def test_16_bit_files_of_a_small_range_are_noticed_remembered_and_cured(make, small_data, tmp_path):
    for folder in ("train_full_size", "test_full_size"):
        for path in (small_data / folder).iterdir():
            image = tifffile.imread(path).astype(np.uint16) * 16 + 32768
            image[0, :2] = 0, 65535  # a dead pixel and a hot one
            tifffile.imwrite(path, image)
    out = make(small_data)
    warning = re.search(
        r"warning: the 16-bit files use (\d+)..(\d+) of 0..65535 only \(60 of 60 files\), so images have few grey "
        r"levels; give stage 01 or run_all.sh --black-level \1 --white-level \2",
        out,
    )
    low, high = int(warning[1]), int(warning[2])
    assert 32768 <= low < 32900 and 36700 < high <= 32768 + 4080
    assert exposure_warning(tmp_path / "work") == warning[0]
    out = make(small_data, "--black-level", low, "--white-level", high)
    assert "black_level was absent, now" in out and "16-bit" not in out and exposure_warning(tmp_path / "work") is None
    source = tifffile.imread(small_data / "train_full_size" / "train-0_green.tif").astype(float)
    plane = read_planes(tmp_path / "work" / "images" / "96" / "train-0.tif")[1]
    np.testing.assert_allclose(plane.mean(), (255 * (source - low) / (high - low)).clip(0, 255).mean(), atol=1)


def test_what_was_made_before_there_was_a_black_level_is_up_to_date(make, small_data, tmp_path):
    make(small_data)
    record, journal = tmp_path / "work" / "samples.csv.meta.json", tmp_path / "work" / "images" / "journal.jsonl"
    assert "black_level" not in json.loads(record.read_text())["parameters"]
    old = json.loads(record.read_text())
    del old["exposure"]
    record.write_text(json.dumps(old))
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        del line["black"], line["exposure"]
        line["peak"] = 4000
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "is up to date" in make(small_data) and exposure_warning(tmp_path / "work") is None
    record.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "images" / "96").iterdir()}
    assert "use 0..4000 of 0..65535 only (15 of 15 files)" in make(small_data)
    assert {path: path.stat().st_mtime_ns for path in before} == before


# --- bad input ---------------------------------------------------------------------------------------------


def test_missing_train_csv(refuses, small_data):
    (small_data / "train.csv").unlink()
    assert "train.csv is missing; expected a CSV file with the columns Id,Target" in refuses(small_data)


def test_missing_channel_files_are_all_listed(refuses, small_data):
    (small_data / "train_full_size" / "train-1_blue.tif").unlink()
    (small_data / "test_full_size" / "test-0_red.tif").unlink()
    message = refuses(small_data)
    assert "2 samples cannot be used" in message and "with --keep-going" in message
    assert "train: train-1_blue" in message and "test: test-0_red" in message


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:9000]), "cannot be"),
        (lambda p: tifffile.imwrite(p, np.zeros((160, 160, 3), np.uint8), photometric="rgb"), "is a colour image"),
        (lambda p: tifffile.imwrite(p, np.zeros((160, 120), np.uint8)), "is not square (120 x 160 px)"),
        (lambda p: tifffile.imwrite(p, np.zeros((96, 96), np.uint8)), "channels of different sizes [96, 160] px"),
        (lambda p: p.write_bytes(b""), "cannot be read"),
    ],
)
def test_bad_images_are_listed_together_and_nothing_made_is_lost(refuses, small_data, tmp_path, spoil, message):
    for i in (2, 5):
        spoil(small_data / "train_full_size" / f"train-{i}_green.tif")
    error = refuses(small_data)
    assert "2 samples cannot be used" in error and message in error
    assert "train-2_green.tif" in error and "train-5_green.tif" in error
    report = pd.read_csv(tmp_path / "work" / "bad_files.csv")
    assert list(report["Id"]) == ["train-2", "train-5"]


def test_missing_damaged_and_undecodable_files_come_in_one_list_after_the_good_ones_are_stored(
    refuses, small_data, tmp_path
):
    folder = small_data / "train_full_size"
    (folder / "train-1_blue.tif").unlink()
    (folder / "train-2_green.tif").write_bytes(b"")
    whole = (folder / "train-5_green.tif").read_bytes()
    (folder / "train-5_green.tif").write_bytes(whole[:9000])  # a whole header: found when it is decoded
    error = refuses(small_data, "--jobs", "2")
    assert "3 samples cannot be used" in error and error.count("cannot be used") == 1
    assert list(pd.read_csv(tmp_path / "work" / "bad_files.csv")["Id"]) == ["train-1", "train-2", "train-5"]
    assert len(list((tmp_path / "work" / "images" / "96").iterdir())) == 12


def test_after_fixing_the_bad_file_the_rest_is_not_made_again(refuses, make, small_data, tmp_path):
    path = small_data / "train_full_size" / "train-2_green.tif"
    good = path.read_bytes()
    path.write_bytes(good[:9000])  # a whole header and half the pixels: found when it is decoded
    refuses(small_data)
    images = tmp_path / "work" / "images" / "96"
    before = {p.name: p.stat().st_mtime_ns for p in images.iterdir()}
    assert len(before) == 14
    path.write_bytes(good)
    make(small_data)
    after = {p.name: p.stat().st_mtime_ns for p in images.iterdir()}
    assert len(after) == 15 and all(after[name] == before[name] for name in before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Id,Target\n../train-0,1\n", "not plain file names"),
        ("Id,Target\ntrain-0,1\ntrain-0,2\n", "appear more than once"),
        ("Id,Target\ntrain-0,28\n", "train-0: '28'"),
        ("Id,Target\ntrain-0,x\n", "train-0: 'x'"),
        ("", "train.csv is empty"),
        ("Id,Target\n", "has no rows"),
        ("Id,Target\ntest-0,1\n", "more than one of train.csv, sample_submission.csv"),
    ],
)
def test_bad_tables(refuses, small_data, text, message):
    if "test-0" in text:
        for path in list((small_data / "test_full_size").glob("test-0_*")):
            shutil.copy(path, small_data / "train_full_size")
    replace_csv(small_data, text)
    assert message in refuses(small_data)


def test_a_work_folder_that_cannot_be_written(fails, small_data, tmp_path):
    (tmp_path / "file").write_text("")
    message = fails(SCRIPT, "--data", small_data, "--work", tmp_path / "file" / "work", "--recipes", "demo-quick")
    assert "cannot be written to (Not a directory)" in message and "give another --work" in message


def test_misspelt_flags_and_recipes_name_the_nearest(fails, small_data):
    assert "unknown argument --dta; did you mean --data?" in fails(SCRIPT, "--dta", small_data)
    assert "unknown argument --recipe; did you mean --recipes?" in fails(SCRIPT, "--recipe", "demo")
    assert "unknown recipe 'resnet5'; did you mean resnet50?" in fails(SCRIPT, "--recipes", "resnet5")
    assert "unknown recipe field 'alfa'; did you mean alpha?" in fails(SCRIPT, "--set", "alfa=1")


# --- real images -------------------------------------------------------------------------------------------


def test_real_full_size_tiffs(run_script, real_data, tmp_path):
    run_script(SCRIPT, "--data", real_data / "kaggle_tiff", "--work", tmp_path)
    for Id in ("000a6c98-bb9b-11e8-b2b9-ac1f6b6435d0", "a7faf0b4-bb99-11e8-b2b9-ac1f6b6435d0"):
        planes = read_planes(tmp_path / "images" / "768" / f"{Id}.tif")
        for plane, channel in zip(planes, CHANNELS, strict=True):
            source = tifffile.imread(real_data / "kaggle_tiff" / "train_full_size" / f"{Id}_{channel}.tif")
            np.testing.assert_array_equal(plane, cv2.resize(source, (768, 768), interpolation=cv2.INTER_AREA))
            # an independent area mean of blocks, where the ratio is whole
            if source.shape[0] == 3072:
                assert np.abs(plane - source.reshape(768, 4, 768, 4).mean(axis=(1, 3))).max() <= 0.5


def test_real_external_fields(run_script, real_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(real_data / "kaggle_tiff", data, copy_function=lambda a, b: __import__("os").symlink(a, b))
    (data / "external").symlink_to(real_data / "external")
    out = run_script(SCRIPT, "--data", data, "--work", tmp_path / "work").stdout
    assert "2 train, 2 external samples at 128, 768 px" in out
    for Id in ("11088_89_B5_1", "30741_800_A6_1"):
        planes = read_planes(tmp_path / "work" / "images" / "768" / f"{Id}.tif")
        for plane, channel, k in zip(planes, CHANNELS, (0, 1, 2, 0), strict=True):
            source = np.asarray(Image.open(real_data / "external" / "images" / f"{Id}_{channel}.jpg"))[..., k]
            # within a grey level or two of the plane itself, far from a grey conversion of the colour image
            assert abs(plane.mean() - source.mean()) < 0.5


def test_real_png_statistics_match_independent_values(run_script, real_data, tmp_path):
    run_script(SCRIPT, "--data", real_data / "kaggle_png", "--work", tmp_path)
    table = pd.read_csv(tmp_path / "images" / "512.csv").set_index("Id")
    for Id in list(table.index)[::20]:
        part = "train" if (real_data / "kaggle_png" / "train" / f"{Id}_red.png").is_file() else "test"
        for channel in CHANNELS:
            source = np.asarray(Image.open(real_data / "kaggle_png" / part / f"{Id}_{channel}.png")) / 255
            assert table.loc[Id, f"mean_{channel}"] == pytest.approx(source.mean(), abs=1e-5)
            assert table.loc[Id, f"std_{channel}"] == pytest.approx(source.std(), abs=1e-5)
            assert table.loc[Id, f"zeros_{channel}"] == pytest.approx((source == 0).mean(), abs=1e-5)
            assert table.loc[Id, f"saturated_{channel}"] == pytest.approx((source == 1).mean(), abs=1e-5)


def test_keep_going_leaves_samples_out_by_name_everywhere(make, run_script, refuses, small_data, tmp_path):
    (small_data / "train_full_size" / "train-1_blue.tif").unlink()
    (small_data / "test_full_size" / "test-0_red.tif").write_bytes(b"no image")
    whole = small_data / "train_full_size" / "train-2_green.tif"
    whole.write_bytes(whole.read_bytes()[:9000])  # its header is fine
    refuses(small_data)
    out = make(small_data, "--keep-going")
    assert "warning: 3 samples are left out here and in all stages" in out
    assert all(name in out for name in ("train-1_blue", "test-0_red", "train-2_green"))
    work = tmp_path / "work"
    left_out = pd.read_csv(work / "left_out.csv", dtype=str)
    assert left_out[["Id", "part", "place"]].to_numpy().tolist() == [
        ["train-1", "train", "1"],
        ["train-2", "train", "2"],
        ["test-0", "test", "1"],
    ]
    assert "up to date" in make(small_data, "--keep-going")
    for name in ("samples.csv", "images/96.csv"):
        ids = set(pd.read_csv(work / name, dtype=str)["Id"])
        assert len(ids) == 12 and not ids & {"train-1", "train-2", "test-0"}
    write_sample(small_data / "train_full_size", "train-2")  # fixed: it is back
    assert "2 samples are left out" in make(small_data, "--keep-going")


def test_a_full_disk_is_noticed_before_the_first_image(tmp_path):
    from common.data.ingest import check_space
    from common.errors import UserError

    with pytest.raises(
        UserError, match=r"about 3307.0 GB are needed in .* for 4000000 images, .* GB are free; free some space"
    ):
        check_space([768] * 4_000_000, tmp_path)
    check_space([768], tmp_path)
