"""How new images become windows, how missing channels are filled, and how far images are from the training data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.data.images import resize
from common.data.options import WHOLE
from common.data.sources import BadImage
from common.predict.batches import NewImages, ahead, fill_missing, kind_of, load_batches, plan_batches, size_for
from common.predict.inputs import InputOptions, NewImage, check, list_images
from common.predict.model import Member, Model, Reference
from common.predict.options import FILLED
from common.predict.page import flat, kind_among, kinds_of
from common.predict.reference import distances, outside, unlikeness
from common.predict.windows import count_windows, cover, scaled_shape, starts
from common.recipes import get_recipe
from common.train.hardware import HardwareOptions, choose_hardware
from tests import clothes

RNG = np.random.default_rng(0)


def image(height, width, pixel_size=None):
    return NewImage("a", (Path("a.png"),) * 4, height=height, width=width, pixel_size=pixel_size)


def test_windows_cover_a_length_evenly_with_the_least_overlap():
    assert starts(100, 100) == [0] and starts(60, 100) == [0]
    assert starts(101, 100) == [0, 1] and starts(250, 100) == [0, 75, 150]
    for length in range(1, 400):
        covered = np.zeros(length, bool)
        for start in starts(length, 64):
            assert 0 <= start <= max(0, length - 64)
            covered[start : start + 64] = True
        assert covered.all() and len(starts(length, 64)) == -(-length // 64)


@pytest.mark.parametrize(
    ("height", "width", "pixel_size", "expected"),
    [
        (2048, 2048, None, (768, 768)),
        (2048, 2048, 0.08, (768, 768)),  # the competition's
        (1024, 1024, 0.16, (768, 768)),  # at half the magnification
        (512, 512, None, (768, 768)),
        (2160, 2560, None, (768, 910)),
        (2160, 2560, 0.08, (810, 960)),
        (1000, 1000, 0.08, (375, 375)),
    ],
)
def test_images_are_brought_to_the_pixel_size_of_training(height, width, pixel_size, expected):
    assert scaled_shape(image(height, width, pixel_size), 768, 0.08 * 2048 / 768) == expected


@pytest.mark.parametrize("size", [40.0, 0.005])
def test_a_pixel_size_that_makes_an_impossible_image_is_refused(size):
    with pytest.raises(BadImage, match=r"px for the network; expected 32 to 8192: check --pixel-size"):
        scaled_shape(image(600, 600, size), 768, 0.2)


def test_sizes_by_source_follow_the_source_unless_its_pixel_size_is_known():
    assert size_for(image(3072, 3072), "by-source-1", 0.08) == (1024, (1024, 1024))
    assert size_for(image(3072, 3072, 0.08), "by-source-1", 0.08) == (768, (1152, 1152))


def test_windows_are_parts_of_the_field_in_reading_order():
    field = np.arange(4 * 70 * 100, dtype=np.uint16).reshape(4, 70, 100)
    windows = cover(field, 60)
    assert len(windows) == count_windows((70, 100), 60) == 4
    assert np.array_equal(windows[1], field[:, :60, 40:]) and np.array_equal(windows[2], field[:, 10:, :60])


def test_a_small_field_is_mirrored_at_its_borders():
    field = np.arange(4 * 40 * 100, dtype=np.uint16).reshape(4, 40, 100)
    left, right = cover(field, 60)
    assert left.shape == right.shape == (4, 60, 60) and np.array_equal(left[:, 10:50], field[:, :, :60])
    assert np.array_equal(left[:, 9], left[:, 11]) and np.array_equal(right[:, 50], right[:, 48])
    assert cover(field[:, :9, :9], 60)[0].shape == (4, 60, 60)


def test_a_plane_is_resized_in_its_proportions():
    plane = RNG.integers(0, 256, (40, 60), dtype=np.uint8)
    assert resize(plane, (20, 30)).shape == (20, 30)
    assert np.array_equal(resize(plane, (20, 30))[0, 0], round(plane[:2, :2].mean() + 1e-9))


# --- batches -----------------------------------------------------------------------------------------------


def tiny_model(*names) -> Model:
    recipes = [get_recipe(name) for name in names]
    return Model(
        "m", Path(), tuple(Member(name, 0, r, 1 / len(names), None) for name, r in zip(names, recipes, strict=True))
    )


def test_a_batch_has_a_bounded_number_of_windows():
    model, images = tiny_model("demo"), [image(256, 256), image(256, 1024), image(256, 256), image(256, 2560)]
    assert plan_batches(images, model, 6) == [[0, 1, 2], [3]]
    assert plan_batches(images, model, 1) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_stage_01_would_store(tmp_path, workers):
    fields = {
        Id: RNG.integers(0, 256, (4, *shape), dtype=np.uint8)
        for Id, shape in {"a": (256, 256), "b": (256, 500), "c": (384, 384)}.items()
    }
    clothes.pngs(tmp_path, fields)
    (tmp_path / "b_red.png").write_bytes(b"\x89PNG")
    model, options = tiny_model("demo", "small_plus"), InputOptions()
    images = [one if one.height else image(256, 500) for one in check(list_images(tmp_path, options), options, 1)]
    kinds = tuple(kind_of(member) for member in model.members)
    hardware = choose_hardware(HardwareOptions("cpu", workers=workers), training=False)
    (batch,) = load_batches(NewImages(images, kinds, 0.08, WHOLE), [[0, 1, 2]], hardware)
    assert [item.row for item in batch.items] == [0, 2] and [item.row for item in batch.faulty] == [1]
    (plain,) = batch.windows[kinds[0]]
    assert plain.owners.tolist() == [0, 1]
    for pixels, Id in zip(plain.images.numpy(), "ac", strict=True):
        assert np.array_equal(pixels, np.stack([resize(plane, 192) for plane in fields[Id]]))
    assert not torch.equal(plain.images, batch.windows[kinds[1]][0].images)  # standardised


def test_items_of_a_thread_keep_their_order_and_errors_are_raised():
    assert list(ahead(iter(range(50)))) == list(range(50))

    def broken():
        yield 1
        raise ValueError("bad")

    items = ahead(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="bad"):
        next(items)
    endless = ahead(iter(int, 1))
    assert next(endless) == 0
    endless.close()  # ends the thread


# --- missing channels --------------------------------------------------------------------------------------


def test_missing_channels_are_filled_as_stated():
    images = torch.tensor(RNG.integers(0, 256, (2, 4, 3, 3), dtype=np.uint8))
    before, means = images.clone(), [11, 12, 13, 14]
    fill_missing(images, ("blue", "yellow"), FILLED, means)
    assert (images[:, 2] == 13).all() and torch.equal(images[:, 3], before[:, 0])
    assert torch.equal(images[:, :2], before[:, :2])
    fill_missing(images, ("red", "yellow"), FILLED, means)  # neither can be copied from the other
    assert (images[:, 0] == 11).all() and (images[:, 3] == 14).all()


# --- distance from the training data -----------------------------------------------------------------------


def test_distances_equal_a_slow_oracle():
    rows, known = RNG.normal(size=(5, 8)), RNG.normal(size=(30, 8))

    def slow(row, others):
        return min(np.linalg.norm((row - other) / (known.std(axis=0) + 1e-3)) for other in others)

    np.testing.assert_allclose(distances(rows, known), [slow(row, known) for row in rows])
    without = [slow(row, np.delete(known, k, axis=0)) for k, row in enumerate(known)]
    np.testing.assert_allclose(distances(known, known, itself=True), without)


def with_references(embeddings, means) -> Model:
    model = tiny_model("demo")
    known = Reference(np.array([str(k) for k in range(len(means))]), np.array([""] * len(means)), embeddings, means)
    return Model("m", Path(), model.members, reference={model.members[0].label: known})


def test_an_image_far_from_the_others_is_unlike():
    near = np.array([1.0, 0, 0, 0]) + RNG.normal(scale=0.05, size=(200, 4))
    model = with_references(near, np.full((200, 4), 0.1))
    far = unlikeness([np.array([[1.0, 0, 0, 0], [0, 1, 0, 0]])], model)
    assert far[0] < 1 < far[1]
    assert unlikeness([near], tiny_model("demo")) is None


def test_dark_and_bright_channels_are_named():
    means = RNG.uniform(0.05, 0.2, (200, 4))
    texts = outside(np.array([[0.1] * 4, [0.01, 0.1, 0.9, 0.01]]), with_references(np.ones((200, 2)), means))
    assert texts == ["", "red and yellow darker, blue brighter"]
    assert outside(means[:2], tiny_model("demo")) == ["", ""]


# --- the map -----------------------------------------------------------------------------------------------


def test_few_images_are_mapped_by_principal_components():
    rows = np.zeros((9, 5))
    rows[np.arange(9), np.arange(9) % 3] = 1 + RNG.random(9)
    places, how = flat(rows)
    assert places.shape == (9, 2) and how == "principal components (too few images for UMAP)"
    assert all(np.allclose(places[k], places[k + 3]) for k in range(6))  # the same direction, so the same place
    assert flat(np.ones((3, 1)))[0].shape == (3, 2)


def test_the_most_frequent_classes_get_a_colour():
    predicted = np.eye(28, dtype=bool)[[3, 3, 5, 9]]
    predicted[3] = False
    named, kinds = kinds_of(predicted, predicted * 0.9)
    assert named == [3, 5] and kinds == [0, 0, 1, 2]
    assert [kind_among(np.eye(28, dtype=bool)[c], named) for c in (5, 7)] == [1, 2]
