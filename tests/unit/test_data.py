from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from common.artifacts.layout import Layout
from common.data.class_weights import draw_weights
from common.data.images import CHANNELS, checksum, read_planes, write_planes
from common.errors import UserError
from common.process.main import run
from common.train import dataset
from common.train.dataset import EpochBatches, ImageSet, collate, dihedral, loader, standardise, whole_batches

RNG = np.random.default_rng(0)
DRAWS = np.random.default_rng(1).random((6, 3))


def random_crop(image, crop, draw):
    """Return a training crop as in the paper's recipes, in one of the 8 symmetries."""
    return dataset.augmented(dataset.random_crop(image, crop, draw), ("dihedral",), draw)


def test_the_eight_symmetries_are_different_and_equal_in_torch():
    image = RNG.integers(0, 256, (4, 5, 5), dtype=np.uint8)
    turned = [dihedral(image, k) for k in range(8)]
    assert len({np.ascontiguousarray(t).tobytes() for t in turned}) == 8
    for k in range(8):
        np.testing.assert_array_equal(dihedral(torch.from_numpy(image.copy()), k).numpy(), turned[k])


def test_crops_keep_the_channels_ratio_and_reach_every_corner():
    image = np.stack([np.arange(64, dtype=np.uint8).reshape(8, 8) + 64 * c for c in range(4)])
    seen, symmetries = set(), set()
    for draw in np.random.default_rng(0).random((300, 3)):
        crop = random_crop(image, 5, draw)
        assert crop.shape == (4, 5, 5) and crop.dtype == np.uint8
        np.testing.assert_array_equal(crop - crop[0], np.arange(0, 256, 64)[:, None, None] + np.zeros((4, 5, 5)))
        seen |= set(crop[0].ravel())
        symmetries.add((int(crop[0, 0, 1]) - int(crop[0, 0, 0]), int(crop[0, 1, 0]) - int(crop[0, 0, 0])))
    assert {0, 7, 56, 63} <= seen and len(symmetries) == 8


def test_standardised_images_have_one_mean_and_deviation_whatever_their_exposure():
    image = cv2.GaussianBlur(RNG.normal(100, 60, (64, 64, 4)), (0, 0), 1).transpose(2, 0, 1).clip(0, 255)
    found = standardise(image.astype(np.uint8)).astype(float)
    pixels = image.astype(np.uint8).reshape(4, -1).astype(float)
    expected = 64 + 24 * (pixels - pixels.mean(axis=1)[:, None]) / (pixels.std(axis=1)[:, None] + 1)
    np.testing.assert_allclose(found.reshape(4, -1), expected.clip(0, 255), atol=0.5)
    darker = standardise((image / 2 + 20).astype(np.uint8)).astype(float)
    assert abs(darker - found).mean() < 1.5 and abs(found.mean() - 64) < 1


def test_the_noise_of_an_empty_channel_stays_small_and_bright_spots_are_cut_off():
    empty = (RNG.random((4, 64, 64)) < 0.01).astype(np.uint8)
    assert standardise(empty).std() < 3 and np.ptp(standardise(np.full_like(empty, 7))) == 0
    empty[:, 5, 5] = 255
    assert (standardise(empty)[:, 5, 5] == 255).all()


def test_a_set_of_standardised_images_standardises_whole_images_before_crops_are_cut(stored):
    whole = standardise(read_planes(stored.folder / "a.tif"))
    stored = replace(stored, standardised=True, cache=dataset.Cache())
    np.testing.assert_array_equal(stored[0, DRAWS[0]][0], random_crop(whole, 32, DRAWS[0]))
    np.testing.assert_array_equal(replace(stored, crop=None)[0][0], whole)


def test_a_sample_that_is_not_stored_is_named_with_the_cure(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "96.csv").write_text(
        "Id,side,crc"
        + "".join(f",{what}_{c}" for what in ("mean", "std", "zeros", "saturated") for c in CHANNELS)
        + "\na,96,0"
        + ",0" * 16
        + "\n"
    )
    with pytest.raises(UserError) as error:
        Layout(tmp_path).read_store("96", ["a", "b", "c"])
    assert str(error.value) == (
        f"{tmp_path}/images/96: 2 missing samples, for example b; run: python 01_preprocess.py --set "
        f"size_rule=fixed size_divisor=1 image_size=96 crop_size=96 --work {tmp_path}"
    )


def test_a_crop_is_the_window_of_its_draw_in_the_symmetry_of_its_draw():
    image = RNG.integers(0, 256, (4, 9, 9), dtype=np.uint8)
    for k in range(8):
        crop = random_crop(image, 4, np.array([0.0, 0.999, (k + 0.5) / 8]))
        np.testing.assert_array_equal(crop, dihedral(image[:, 0:4, 5:9], k))


def test_each_row_comes_once_an_epoch_in_another_order():
    epochs = [[p[0] for batch in EpochBatches(40, 8, 0, epoch) for p in batch] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]


def test_rows_are_drawn_as_often_as_their_weights_say_rounded_up_or_down():
    weights = np.array([1, 1, 1, 5, 0.5, 3.5])
    counts = np.array(
        [np.bincount(EpochBatches(6, 3, 0, epoch, weights=weights).order, minlength=6) for epoch in range(4000)]
    )
    expected = 6 * weights / weights.sum()
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.04)
    assert sorted(EpochBatches(40, 8, 0, 0, weights=np.full(40, 0.1)).order) == list(range(40))
    places = np.array(
        [np.flatnonzero(EpochBatches(6, 3, 0, epoch, weights=weights).order == 3)[0] for epoch in range(300)]
    )
    assert set(places) >= {0, 1, 2, 3}  # in any order


def test_a_sample_is_drawn_by_the_count_of_its_rarest_class():
    targets = np.zeros((27, 28), dtype=bool)
    targets[:25, 0] = targets[:4, 1] = targets[0, 2] = True  # 25, 4 and 1 samples; the last two samples have no class
    np.testing.assert_allclose(draw_weights(targets, 0.5), [1, *[1 / 2] * 3, *[1 / 5] * 23])
    np.testing.assert_allclose(draw_weights(targets, 1.0), [1, *[1 / 4] * 3, *[1 / 25] * 23])
    assert draw_weights(targets, 0.0) is None


def test_batches_are_full_and_small_sets_make_one():
    assert [len(batch) for batch in EpochBatches(43, 8, 0, 0)] == [8] * 5
    assert [len(batch) for batch in EpochBatches(5, 8, 0, 0)] == [5]


def test_a_resumed_epoch_goes_on_where_it_stopped():
    whole, rest = list(EpochBatches(40, 8, 3, 2)), list(EpochBatches(40, 8, 3, 2, start=3))
    assert [row for batch in rest for row, _ in batch] == [row for batch in whole[3:] for row, _ in batch]
    np.testing.assert_array_equal(
        [draw for batch in rest for _, draw in batch], [draw for batch in whole[3:] for _, draw in batch]
    )


@pytest.fixture
def stored(tmp_path):
    for Id in "abcdef":
        write_planes(tmp_path / f"{Id}.tif", RNG.integers(0, 256, (4, 48, 48), dtype=np.uint8))
    return ImageSet(tmp_path, np.array(list("abcdef")), np.eye(6, 28, dtype=bool), crop=32)


def test_items_do_not_depend_on_the_number_of_workers(stored):
    def images(workers):
        return torch.cat([batch[0] for batch in loader(stored, workers, False, EpochBatches(6, 2, 0, 4))])

    assert torch.equal(images(0), images(2))


def test_small_images_are_decoded_once_and_no_more_are_kept_than_there_is_room_for(stored, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        dataset, "read_planes", lambda path, *how, **more: decoded.append(path.stem) or read_planes(path, *how, **more)
    )
    stored.cache.room = 2 * 4 * 48 * 48 + 1
    first = [stored[row, DRAWS[row]][0].copy() for row in range(3)]
    again = [stored[row, DRAWS[row]][0] for row in range(3)]
    assert all(map(np.array_equal, first, again)) and decoded == ["a", "b", "c", "c"]


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_crops_are_the_same_whether_the_image_is_kept_or_read_in_part(tmp_path, raw, standardised):
    planes = RNG.integers(0, 40, (4, 300, 300), dtype=np.uint8)
    write_planes(tmp_path / "a.tif", planes, raw)
    stored = ImageSet(
        tmp_path,
        np.array(["a"]),
        np.eye(1, 28, dtype=bool),
        crop=200,
        crcs={"a": checksum(planes)},
        standardised=standardised,
    )
    in_part = replace(stored, cache=dataset.Cache(room=0))
    for draw in DRAWS:
        crop, part = stored[0, draw][0], in_part[0, draw][0]
        np.testing.assert_array_equal(part, random_crop(standardise(planes) if standardised else planes, 200, draw))
        np.testing.assert_array_equal(part, crop)
    assert stored.cache and not in_part.cache


def test_a_full_cache_reads_crops_in_part(stored):
    stored.cache.room = 4 * 48 * 48 - 1
    stored[0, DRAWS[0]]
    assert not stored.cache.room and not stored.cache


def test_a_loader_process_keeps_no_images(stored):
    assert len(list(loader(stored, 1, False, EpochBatches(6, 2, 0, 4)))) == 3 and not stored.cache


def test_copies_of_a_sample_and_epochs_get_different_crops_and_a_second_run_gets_the_same():
    draws = np.concatenate([EpochBatches(40, 8, 0, epoch).draws for epoch in (0, 1)])
    assert len(np.unique(draws, axis=0)) == 80 and draws.min() >= 0 and draws.max() < 1
    np.testing.assert_array_equal(EpochBatches(40, 8, 0, 0).draws, draws[:40])
    assert not np.array_equal(EpochBatches(40, 8, 1, 0).draws, draws[:40])


def test_batches_are_bytes_until_they_are_on_the_device(stored):
    images, targets = collate([stored[0, DRAWS[0]], stored[1, DRAWS[1]]])
    assert (images.dtype, images.shape) == (torch.uint8, (2, 4, 32, 32))
    assert images.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(images[1], stored[1, DRAWS[1]][0])
    assert (targets.dtype, targets.shape) == (torch.float32, (2, 28))


def test_a_missing_image_is_one_message_also_from_a_worker_process(tmp_path, capsys):
    missing = ImageSet(tmp_path, np.array(["x", "y"]), np.zeros((2, 28)))
    with pytest.raises(SystemExit) as stop:
        run(lambda: list(loader(missing, 1, False, [[0]])))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith(f"error: {tmp_path}") and "Traceback" not in message


def test_a_missing_image_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="x.tif is missing; run: python 01_preprocess.py --set .* image_size=96 "):
        ImageSet(tmp_path / "96", np.array(["x"]), np.zeros((1, 28)))[0]


def test_whole_images_of_one_size_are_a_batch(tmp_path):
    names = np.array(list("abcdefg"))
    mixed = ImageSet(tmp_path, names, np.zeros((7, 28), dtype=bool), sides=np.array([96, 128, 96, 96, 128, 96, 96]))
    assert [rows.tolist() for rows in whole_batches(mixed, 3)] == [[0, 2, 3], [5, 6], [1, 4]]
    alike = ImageSet(tmp_path, names, np.zeros((7, 28), dtype=bool))
    assert [rows.tolist() for rows in whole_batches(alike, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert whole_batches(ImageSet(tmp_path, names[:0], np.zeros((0, 28), dtype=bool)), 3) == []
