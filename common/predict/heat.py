"""Heat maps of new images: which part of a window is evidence for a class."""

from collections.abc import Sequence

import numpy as np
import torch

from common.classes import CLASS_NAMES
from common.data.pictures import jpeg
from common.predict.answers import Planned
from common.predict.batches import fill_missing, kind_of, prepared, size_for
from common.predict.inputs import NewImage, read_image
from common.predict.model import Member, Model
from common.predict.run import grey_levels
from common.predict.windows import cover, scaled_planes
from common.report.heat_maps import probabilities_and_maps, seen_by
from common.report.page import Card, data_uri, share
from common.report.sample import EMPTY, overlay
from common.train.dataset import Normalisation
from common.train.hardware import HardwareOptions, choose_hardware


def cards_of(model: Model, image: NewImage, classes: Sequence[int], planned: Planned) -> list[Card]:
    """Return a card with the heat map of each class, by the networks of the model's first run."""
    members = [member for member in model.members if member.name == model.names[0]]
    planes, _ = read_image(image)
    side, shape = size_for(image, members[0].recipe.store, model.pixel_size)
    windows = cover(scaled_planes(planes, shape, planned.options.levels), side)
    hardware = choose_hardware(HardwareOptions("cpu", "fp32"), training=False)
    networks = [member.load(hardware) for member in members]
    best: dict[int, tuple[float, np.ndarray, np.ndarray]] = {}

    def more_probable(probs: np.ndarray) -> list[int]:
        return [int(c) for c in classes if c not in best or probs[c] > best[c][0]]

    for window in windows:
        seen = [
            seen_by(network, normalise, given(window, image, member, normalise, planned))
            for (network, normalise), member in zip(networks, members, strict=True)
        ]
        probs, maps = probabilities_and_maps(seen, window.shape[1], more_probable)
        best.update({c: (float(probs[c]), heat, window) for c, heat in maps.items()})
    return [
        Card(
            [(data_uri(jpeg(overlay(window, heat))), f"heat map of {CLASS_NAMES[c]} in {image.Id}")],
            [CLASS_NAMES[c], f"probability {share(prob)}", *([] if heat.any() else [EMPTY])],
        )
        for c, (prob, heat, window) in best.items()
    ]


def given(
    window: np.ndarray, image: NewImage, member: Member, normalise: Normalisation, planned: Planned
) -> np.ndarray:
    """Return a window as a member is given it, (4, side, side) uint8, with missing channels filled."""
    pixels = torch.from_numpy(np.ascontiguousarray(prepared(window, kind_of(member))))[None]
    fill_missing(pixels, image.missing, planned.settings.filled, grey_levels(normalise))
    return pixels[0].numpy()
