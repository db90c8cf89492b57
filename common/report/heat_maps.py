"""What networks attend to in one sample: Grad-CAM heat maps (Selvaraju et al. 2017), and probabilities."""

from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from captum.attr import LayerGradCam

from common.train.checkpoints import finished_checkpoint, load_network
from common.train.dataset import Normalisation, dihedral
from common.train.fold_data import image_set
from common.train.hardware import HardwareOptions, choose_hardware
from common.train.networks import Classifier, GapNetEncoder

VIEWS = range(8)


def explain(
    work: Path,
    recipe_name: str,
    numbers: list[int],
    folds: pd.DataFrame,
    sample: pd.DataFrame,
    choose: Callable[[np.ndarray], Iterable[int]],
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Return the mean probabilities of some folds' networks for a sample, (28,), and heat maps of classes.

    Heat maps are class -> (side, side) in [0, 1]. Like predictions, they are means over the networks and the 8
    symmetries of the image, each turned back; all 0 if no network finds anything.

    sample : one row with Id and Target
    choose : function of the probabilities -> classes to explain
    """
    hardware = choose_hardware(HardwareOptions("cpu", "fp32"), training=False)
    seen = []  # a network's camera and its views of the image
    for fold in numbers:
        path, recipe = finished_checkpoint(work, recipe_name, fold, folds, "best")
        planes, _ = image_set(work, recipe, sample)[0]
        seen.append(seen_by(*load_network(path, recipe, hardware), planes))
    return probabilities_and_maps(seen, planes.shape[1], choose)


def seen_by(model: Classifier, normalise: Normalisation, planes: np.ndarray) -> tuple[LayerGradCam, torch.Tensor]:
    """Return a network's camera and its normalised views of an image, (4, side, side) uint8."""
    image = torch.from_numpy(planes)
    images = normalise(torch.stack([dihedral(image, view) for view in VIEWS]), torch.device("cpu"))
    return LayerGradCam(model.eval(), last_map(model)), images


def last_map(model: Classifier) -> torch.nn.Module:
    """Return the layer whose features are pooled, the last of them where several are."""
    levels = ["c"] if isinstance(model.encoder, GapNetEncoder) else list(model.levels)
    return model.get_submodule(".".join(["encoder", *levels[-1:]]))


def probabilities_and_maps(
    seen: list[tuple[LayerGradCam, torch.Tensor]], side: int, choose: Callable[[np.ndarray], Iterable[int]]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Return what `explain` does, from what some networks see of an image of `side` pixels (see `seen_by`)."""
    with torch.no_grad():
        probs = np.mean([camera.forward_func(images).sigmoid().mean(dim=0).numpy() for camera, images in seen], axis=0)
    return probs, {c: heat_map(seen, c, side) for c in choose(probs)}


def heat_map(seen: list[tuple[LayerGradCam, torch.Tensor]], c: int, side: int) -> np.ndarray:
    """Return the evidence for class `c` in the views of one image, (side, side), at most 1; all 0 without evidence.

    seen : for each network, its camera and its normalised views. Maps are not rescaled before the mean, so that a
        network that finds next to nothing counts less than one that is sure.
    """
    maps = [
        turned_back(one, view)
        for camera, images in seen
        for one, view in zip(
            camera.attribute(images, target=c, relu_attributions=True).detach()[:, 0], VIEWS, strict=True
        )
    ]
    mean = torch.stack(maps).mean(dim=0).numpy()
    return cv2.resize(mean / max(1e-12, mean.max()), (side, side), interpolation=cv2.INTER_LINEAR)


def turned_back(image: torch.Tensor, view: int) -> torch.Tensor:
    """Undo `dataset.dihedral`, which first transposes and then mirrors."""
    return dihedral(dihedral(image, view & 6), view & 1)
