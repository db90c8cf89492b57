import numpy as np
import pandas as pd
import pytest

from common.artifacts.stage import Stage, write_csv
from common.data.exposure import WHOLE, Levels, describe, exposure_warning, judge, signal_elsewhere, used_range

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
    ],
)
def test_a_part_of_the_range_that_most_files_use_is_named(ranges, levels, line):
    (found,) = said([files(*ranges)] * 3, levels)
    assert line.replace("of 4 files", "of 12 files").replace("(4 of", "(12 of").replace("(3 of", "(9 of") in found


@pytest.mark.parametrize(
    ("ranges", "levels"),
    [
        ([[0, 60000], [100, 40000], [0, 900]], WHOLE),
        ([[0, 4095]] * 3, Levels(0, 4095)),
        ([[32768, 36848]] * 3, Levels(32768, 36863)),
        ([], WHOLE),
    ],
)
def test_files_that_use_the_range_are_no_concern(ranges, levels):
    assert said([files(*ranges)] * 3, levels) == []


def test_one_part_from_another_camera_is_named():
    samples = [files([0, 60000])] * 9 + [files([0, 4000])]
    (line,) = said(samples, parts=["train"] * 9 + ["test"])
    assert line.startswith("the 16-bit test files use 0..4000 of 0..65535 only (1 of 1 files)")


@pytest.mark.parametrize(
    ("low", "high", "flags"),
    [
        (0, 4080, "--white-level 4095"),
        (100, 4095, "--white-level 4095"),
        (0, 9000, "--white-level 16383"),
        (0, 0, "--white-level 1"),
        (32768, 36848, "--black-level 32768 --white-level 36848"),
        (65535, 65535, "--black-level 65534 --white-level 65535"),
    ],
)
def test_the_flags_that_cure(low, high, flags):
    (line,) = said([files([low, high])] * 3)
    assert line.endswith(f"; give stage 01 or run_all.sh {flags}")


def test_levels_that_would_cut_off_other_files_are_not_advised():
    (line,) = said([files([0, 4000])] * 8 + [files([0, 65535])])
    assert "8 of 9 files" in line and line.endswith(
        "1 files use more, so no level suits all; save them all in one range"
    )
    (line,) = said([files([0, 4000])] * 12 + [files([0, 65535])])
    assert line.endswith("--white-level 4095")


@pytest.mark.parametrize(
    ("means", "own", "place"),
    [
        ((1, 0, 80), (0,), "blue plane"),
        ((80, 1, 0), (0,), None),
        ((80, 75, 0), (0, 1), None),
        ((10, 80, 80), (0, 1), "green and blue planes"),
        ((0, 0, 0), (1,), None),
        ((30, 80, 20), (0,), None),
    ],
)
def test_signal_in_the_planes_of_other_channels_is_noticed(means, own, place):
    image = np.broadcast_to(np.array(means, np.uint8), (32, 32, 3))
    assert signal_elsewhere(image, own) == place
    assert signal_elsewhere(image.astype(np.uint16) * 257, own) == place


def test_misplaced_files_are_counted_and_some_are_named():
    samples = [{"ranges": [], "misplaced": {f"{k}_red.jpg": "blue plane"}} for k in range(8)]
    (line,) = said(samples, parts=["external"] * 8)
    assert (
        "8 colour images" in line
        and "in 4_red.jpg nearly everything is in the blue plane; and 3 more" in line
        and "5_red" not in line
    )


def test_a_work_folder_remembers(tmp_path):
    assert exposure_warning(tmp_path) is None
    stage = Stage("01_preprocess", tmp_path / "samples.csv", {}, {})
    write_csv(stage.artifact, pd.DataFrame({"Id": ["a"]}))
    stage.finish(rows=1)
    assert exposure_warning(tmp_path) is None
    for sample, line in (
        (files([0, 60000]), None),
        (files([0, 4000]), "warning: the 16-bit files use 0..4000 of 0..65535 only"),
    ):
        stage.finish(rows=1, exposure=judge(["train"], [sample], WHOLE))
        found = exposure_warning(tmp_path)
        assert found == line or (found.startswith(line) and "\n" not in found)
