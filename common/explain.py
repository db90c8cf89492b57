"""Where a network looks: heat maps of Grad-CAM (Selvaraju et al. 2017), and its probabilities, for one sample."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from captum.attr import LayerGradCam

from common.checkpoints import finished_checkpoint, load_network
from common.data import dihedral
from common.fold_data import image_set
from common.hardware import HardwareOptions, choose_hardware

VIEWS = range(8)


def explain(work: Path, recipe_name: str, fold: int, folds: pd.DataFrame, sample: pd.DataFrame, choose):
    """Return a network's probabilities of a sample (28,) and its heat maps: class -> (side, side) in [0, 1].

    sample : one row with Id and Target
    choose : function of the probabilities -> classes to explain
    The maps are means over the 8 symmetries of the image, as predictions are, each turned back.
    """
    path, recipe = finished_checkpoint(work, recipe_name, fold, folds, "best")
    hardware = choose_hardware(HardwareOptions("cpu", "fp32"), training=False)
    model, normalise = load_network(path, recipe, hardware)
    model.eval()
    planes, _ = image_set(work, recipe, sample)[0]
    image = torch.from_numpy(planes)
    images = normalise(torch.stack([dihedral(image, view) for view in VIEWS]), hardware.device)
    with torch.no_grad():
        probs = model(images).sigmoid().mean(dim=0).numpy()
    camera = LayerGradCam(model, model.encoder.c if recipe.pooling == "own" else model.encoder)
    return probs, {c: heat_map(camera, images, c, planes.shape[1]) for c in choose(probs)}


def heat_map(camera: LayerGradCam, images: torch.Tensor, c: int, side: int) -> np.ndarray:
    """Return what speaks for class `c` in the views of one image, (side, side), 1 where most does."""
    maps = camera.attribute(images, target=c, relu_attributions=True).detach()[:, 0]  # (8, h, w)
    mean = torch.stack([turned_back(one, view) for one, view in zip(maps, VIEWS, strict=True)]).mean(dim=0).numpy()
    return cv2.resize(mean / max(1e-12, mean.max()), (side, side), interpolation=cv2.INTER_LINEAR)


def turned_back(image: torch.Tensor, view: int) -> torch.Tensor:
    """Undo `data.dihedral`, which transposes first and mirrors then."""
    return dihedral(dihedral(image, view & 6), view & 1)
