import numpy as np
import pandas as pd
import pytest

from common.artifacts.stage import Record, Stage
from common.artifacts.tables import write_csv
from common.data.exposure import (
    WHOLE,
    Levels,
    describe,
    exposure_warning,
    judge,
    judge_ranges,
    signal_elsewhere,
    used_range,
)

RNG = np.random.default_rng(0)


def files(*ranges):
    return {"ranges": list(ranges), "misplaced": {}}


def said(samples, levels=WHOLE, parts=None):
    return describe(judge(parts or ["train"] * len(samples), samples, levels))


@pytest.mark.parametrize("side", [64, 512, 2048])
def test_neither_hot_nor_dead_pixels_hide_the_range(side):
    plane = RNG.integers(33000, 34001, (side, side)).astype(np.uint16)
    plane[0, 0], plane[-1, 0], plane[0, side // 2] = 65535, 65535, 0
    assert used_range(plane) == [pytest.approx(33000, abs=3), pytest.approx(34000, abs=3)]


@pytest.mark.parametrize(("side", "left_out"), [(31, 0), (32, 1), (44, 1), (45, 2), (1024, 262)])
def test_a_thousandth_of_the_pixels_is_left_out_at_either_end(side, left_out):
    """It reads all pixels of small images, and every second pixel per row and column in one of 1024."""
    plane = np.full((side, side), 7, np.uint16)
    seen = np.arange(side)[:: 2 if side == 1024 else 1]
    values = np.arange(len(seen) ** 2) * 65535 // (len(seen) ** 2 - 1)
    plane[np.ix_(seen, seen)] = RNG.permutation(values).reshape(len(seen), -1)
    assert used_range(plane) == [values[left_out], values[-1 - left_out]]


@pytest.mark.parametrize(
    ("ranges", "levels", "line"),
    [
        ([[0, 4080]] * 4, WHOLE, "use 0..4080 of 0..65535 only (4 of 4 files)"),
        ([[0, 16383]] * 4, WHOLE, "use 0..16383 of 0..65535 only"),
        ([[32768, 36848]] * 4, WHOLE, "use 32768..36848 of 0..65535 only"),
        ([[20000, 60000]] * 4, WHOLE, "use 20000..60000 of 0..65535 only"),  # never near black
        (
            [[0, 4000], [0, 3000], [0, 65535], [0, 900]],
            WHOLE,
            "use 0..4000 of 0..65535 only (3 of 4 files)",
        ),  # one of another kind
        ([[0, 4080]] * 4, Levels(0, 1000), "reach 4080 and are cut off at --white-level 1000"),
        ([[32768, 36848]] * 4, Levels(0, 36848), "use 32768..36848 of 0..36848 only"),
        ([[0, 0]] * 4, WHOLE, "use 0..0 of 0..65535 only"),
        ([[0, 249]] * 4, Levels(0, 1000), "use 0..249 of 0..1000 only"),  # less than a quarter
        ([[251, 1000]] * 4, Levels(0, 1000), "use 251..1000 of 0..1000 only"),
        ([[400, 649]] * 4, Levels(400, 1400), "use 400..649 of 400..1400 only"),
        ([[0, 1001]] * 4, Levels(0, 1000), "reach 1001 and are cut off at --white-level 1000"),
        ([[0, 4000]] * 2 + [[0, 65535]] * 2, WHOLE, "use 0..4000 of 0..65535 only (2 of 4 files)"),  # half of them
    ],
)
def test_a_part_of_the_range_that_most_files_use_is_named(ranges, levels, line):
    (found,) = said([files(*ranges)] * 3, levels)
    assert (
        line.replace("of 4 files", "of 12 files")
        .replace("(4 of", "(12 of")
        .replace("(3 of", "(9 of")
        .replace("(2 of", "(6 of")
        in found
    )


@pytest.mark.parametrize(
    ("ranges", "levels"),
    [
        ([[0, 60000], [100, 40000], [0, 900]], WHOLE),
        ([[0, 4095]] * 3, Levels(0, 4095)),
        ([[32768, 36848]] * 3, Levels(32768, 36863)),
        ([], WHOLE),
        ([[0, 250]] * 3, Levels(0, 1000)),  # a quarter
        ([[250, 1000]] * 3, Levels(0, 1000)),
        ([[400, 650]] * 3, Levels(400, 1400)),
        ([[300, 650]] * 3, Levels(400, 1400)),  # values below black are ignored
        ([[0, 4000]] * 2 + [[0, 65535]] * 3, WHOLE),  # less than half of them
    ],
)
def test_files_that_use_the_range_are_no_concern(ranges, levels):
    assert said([files(*ranges)] * 3, levels) == []


def test_a_twentieth_of_the_files_at_either_end_is_left_out_of_the_range_that_is_named():
    """Of 101 files, those with the five lowest and five highest values do not count."""
    ranges = np.stack([np.arange(101), 3000 + np.arange(101)], axis=1)
    found = judge_ranges(ranges, WHOLE)
    assert (found["low"], found["high"]) == (5, 3095)


def test_one_part_from_another_camera_is_named():
    samples = [files([0, 60000])] * 9 + [files([0, 4000])]
    (line,) = said(samples, parts=["train"] * 9 + ["test"])
    assert line.startswith("the 16-bit test files use 0..4000 of 0..65535 only (1 of 1 files)")


@pytest.mark.parametrize("others", [[], [files([0, 60000])]])
@pytest.mark.parametrize("order", [1, -1])
def test_parts_with_one_fault_are_told_together_in_the_range_of_both(order, others):
    """The parts are named if others have no fault."""
    two = [("test", files([100, 900])), ("train", files([0, 4000], [0, 4000], [0, 60000]))][::order]
    (line,) = said([sample for _, sample in two] + others, parts=[part for part, _ in two] + ["external"] * len(others))
    names = f" {' and '.join(part for part, _ in two)}" if others else ""
    assert line.startswith(f"the 16-bit{names} files use 0..4000 of 0..65535 only (3 of 4 files), ")


def test_parts_with_two_faults_are_two_warnings():
    samples = [files([0, 100]), files([0, 4000]), files([0, 900])]
    cut_off, narrow = said(samples, Levels(0, 1000), ["test", "train", "external"])
    assert cut_off.startswith("the 16-bit train files reach 4000 and are cut off at --white-level 1000 (1 of 1 files)")
    assert narrow.startswith("the 16-bit test files use 0..100 of 0..1000 only (1 of 1 files)")


@pytest.mark.parametrize(
    ("low", "high", "flags"),
    [
        (0, 4080, "--white-level 4095"),
        (100, 4095, "--white-level 4095"),
        (0, 9000, "--white-level 16383"),
        (0, 0, "--white-level 1"),
        (32768, 36848, "--black-level 32768 --white-level 36848"),
        (65535, 65535, "--black-level 65534 --white-level 65535"),
        (20, 100, "--white-level 127"),  # an offset of a quarter of the used range is ignored
        (21, 100, "--black-level 21 --white-level 100"),
        (0, 4096, "--white-level 8191"),
    ],
)
def test_the_flags_that_cure(low, high, flags):
    (line,) = said([files([low, high])] * 3)
    assert line.endswith(f"; give stage 01 or run_all.sh {flags}")


def test_levels_that_would_cut_off_other_files_are_not_advised():
    (line,) = said([files([0, 4000])] * 8 + [files([0, 65535])])
    assert "8 of 9 files" in line and line.endswith(
        "1 files use more, so no level fits all; save them all with the same range"
    )
    for n in (9, 12):  # a tenth and less
        (line,) = said([files([0, 4000])] * n + [files([0, 65535])])
        assert line.endswith("--white-level 4095")
    (line,) = said([files([0, 4000])] * 58 + [files([0, 4095]), files([0, 4096])] + [files([0, 65535])] * 7)
    assert "60 of 67 files" in line and "; 8 files use more, so no level fits all" in line  # not that of 4095


@pytest.mark.parametrize(
    ("means", "own", "place"),
    [
        ((1, 0, 80), (0,), "blue plane"),
        ((80, 1, 0), (0,), None),
        ((80, 75, 0), (0, 1), None),
        ((10, 80, 80), (0, 1), "green and blue planes"),
        ((0, 0, 0), (1,), None),
        ((30, 80, 20), (0,), None),
        ((20, 80, 0), (0,), None),  # a quarter of the brightest
        ((19, 80, 0), (0,), "green plane"),
        ((0, 20, 80), (0,), "green and blue planes"),
        ((0, 19, 80), (0,), "blue plane"),
        ((80, 19, 0), (0, 1), "red plane"),  # one of two
    ],
)
def test_signal_in_the_planes_of_other_channels_is_noticed(means, own, place):
    image = np.broadcast_to(np.array(means, np.uint8), (32, 32, 3))
    assert signal_elsewhere(image, own) == place
    assert signal_elsewhere(image.astype(np.uint16) * 257, own) == place


@pytest.mark.parametrize(("bright", "place"), [(511, None), (512, "blue plane")])
def test_an_image_that_is_black_but_for_noise_has_no_signal_elsewhere(bright, place):
    """The limit is a mean of half a grey level, here of 1,024 pixels of which `bright` have one; all of them count."""
    image = np.zeros((32, 32, 3), np.uint8)
    image.reshape(-1, 3)[1 : 2 * bright : 2, 2] = 1
    assert signal_elsewhere(image, (0,)) == place


def test_one_pixel_does_not_stand_for_an_image():
    image = np.zeros((1100, 1100, 3), np.uint8)
    image[..., 0], image[0, 0] = 90, (0, 0, 255)
    assert signal_elsewhere(image, (0,)) is None and signal_elsewhere(image, (2,)) == "red plane"


def test_misplaced_files_are_counted_and_some_are_named():
    samples = [{"ranges": [], "misplaced": {f"{k}_red.jpg": "blue plane"}} for k in range(8)]
    (line,) = said(samples, parts=["external"] * 8)
    assert (
        "8 colour images" in line
        and "in 4_red.jpg nearly all signal is in the blue plane; and 3 more" in line
        and "5_red" not in line
    )


def test_a_work_folder_remembers(tmp_path):
    assert exposure_warning(tmp_path) is None
    stage = Stage("01_preprocess", tmp_path / "samples.csv", {}, {})
    write_csv(stage.artifact, pd.DataFrame({"Id": ["a"]}))
    stage.seal(Record(1))
    assert exposure_warning(tmp_path) is None
    for sample, line in (
        (files([0, 60000]), None),
        (files([0, 4000]), "warning: the 16-bit files use 0..4000 of 0..65535 only"),
    ):
        stage.seal(Record(1, notes={"exposure": judge(["train"], [sample], WHOLE)}))
        found = exposure_warning(tmp_path)
        assert found == line or (found.startswith(line) and "\n" not in found)
