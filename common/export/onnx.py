"""ONNX: a graph that takes images of 0 to 255 and returns the model's probabilities, checked with onnxruntime.

One graph holds all networks that take images of one size: normalisation, test-time views, sigmoid and the weighted
mean are inside. Models whose networks take several sizes become several graphs, whose outputs are averaged by `share`.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from common.artifacts.files import writing
from common.errors import UserError, first_line
from common.predict.model import Member, Model
from common.process.progress import progress
from common.train.dataset import STANDARD_DEVIATION, STANDARD_MEAN, Normalisation, dihedral
from common.train.hardware import Hardware

OPSET = 17
TOLERANCE = 1e-4
TRACED = (2, 4, 96, 96)
CHECKED = (3, 4, 128, 96)  # another number of images, of another shape
LARGEST_CHECKED = 128  # pixels: all sizes run the same graph


class Graph(nn.Module):
    """The networks of one image size: (n, 4, h, w) float32 images of 0 to 255 -> (n, n_classes) probabilities.

    members : networks with their normalisations; weights : with sum 1
    tta : none or dihedral
    """

    def __init__(
        self,
        members: Sequence[tuple[nn.Module, Normalisation]],
        weights: list[float],
        tta: str,
        standardised: list[bool],
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(network for network, _ in members)
        self.weights, self.standardised = weights, standardised
        self.turns = (0, 2, 4, 6) if tta == "dihedral" else (0,)
        self.transposes = (0, 1) if tta == "dihedral" else (0,)
        for k, (_, normalise) in enumerate(members):
            self.register_buffer(f"mean{k}", torch.tensor(normalise.mean).view(1, 4, 1, 1))
            self.register_buffer(f"std{k}", torch.tensor(normalise.std).view(1, 4, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        plain = images
        standard = standardise(images) if any(self.standardised) else images
        total = torch.zeros(1)
        for transposed in self.transposes:  # views of one shape make one batch
            for k, network in enumerate(self.networks):
                own = standard if self.standardised[k] else plain
                views = torch.cat([dihedral(own, turn | transposed) for turn in self.turns])  # (views x n, 4, h, w)
                normal = (views / 255 - self.get_buffer(f"mean{k}")) / self.get_buffer(f"std{k}")
                probs = network(normal).sigmoid()  # (views x n, n_classes)
                mean = probs.reshape(len(self.turns), -1, probs.shape[1]).mean(dim=0)
                total = total + mean * (self.weights[k] / len(self.transposes))
        return total


def standardise(images: torch.Tensor) -> torch.Tensor:
    """Return images with each channel at the standard mean and deviation; see `dataset.standardise`."""
    exact = images.double()
    mean = exact.mean(dim=(2, 3), keepdim=True)
    deviation = ((exact * exact).mean(dim=(2, 3), keepdim=True) - mean * mean).clamp(min=0).sqrt()
    levels = STANDARD_MEAN + STANDARD_DEVIATION * (exact - mean) / (deviation + 1)
    return levels.round().clamp(0, 255).float()


def write_graphs(model: Model, folder: Path, hardware: Hardware, description: dict) -> list[dict]:
    """Write a graph for each image size; return their records: file, side, share and members.

    Raises UserError if onnxruntime does not compute what torch does.
    """
    stores = list(dict.fromkeys(member.recipe.store for member in model.members))
    records = []
    for store in progress(stores, len(stores), "ONNX", "graphs"):
        members = [member for member in model.members if member.recipe.store == store]
        share = sum(member.weight for member in members)
        graph = build_graph(members, model.tta, hardware)
        name = "model.onnx" if len(stores) == 1 else f"model-{store}.onnx"
        with writing(folder / name) as temporary, explained():
            write_graph(graph, temporary, description)
            difference = check_graph(graph, temporary, members[0].recipe.size)
        records.append(
            {
                "file": name,
                "store": store,
                "side": members[0].side,
                "share": share,
                "members": [member.label for member in members],
                "opset": OPSET,
                "largest_difference": difference,
            }
        )
    return records


@contextmanager
def explained() -> Iterator[None]:
    """Turn what torch and onnxruntime raise for networks that cannot become a graph into a UserError."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # theirs share no other type
        raise UserError(
            f"these networks cannot become an ONNX graph ({first_line(error)}); leave it out with --no-onnx"
        ) from None


def build_graph(members: list[Member], tta: str, hardware: Hardware) -> Graph:
    """Return the graph of members with images of one size."""
    share = sum(member.weight for member in members)
    weights = [member.weight / share if share else 1 / len(members) for member in members]
    loaded = [member.load(hardware) for member in members]
    return Graph(loaded, weights, tta, [member.recipe.standardised for member in members]).eval()


def write_graph(graph: Graph, path: Path, description: dict) -> None:
    """Write a graph as ONNX, for any number and size of images, with the names of channels and classes in it."""
    images = test_images(TRACED)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch's newer exporter takes ten times as long and gives the same numbers
        torch.onnx.export(
            graph.to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]  # not in the stubs
            (images,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_axes={"images": {0: "n", 2: "height", 3: "width"}, "probabilities": {0: "n"}},
        )
    saved = onnx.load(path)
    onnx.helper.set_model_props(
        saved,
        {
            "name": description["name"],
            "licence": description["licence"] or "none stated",
            "channels": json.dumps([row["name"] for row in description["channels"]]),
            "classes": json.dumps(description["classes"]),
        },
    )
    onnx.checker.check_model(saved)
    onnx.save(saved, path)


def check_graph(graph: Graph, path: Path, side: int) -> float:
    """Return the largest difference between torch and onnxruntime; raises UserError above TOLERANCE."""
    session = open_session(path)
    side = min(side, LARGEST_CHECKED)
    worst = 0.0
    for shape in (CHECKED, (1, 4, side, side)):
        images = test_images(shape)
        with torch.inference_mode():
            expected = graph(images).numpy()
        found = session.run(None, {"images": images.numpy()})[0]
        worst = max(worst, float(np.abs(found - expected).max()))
    if not worst <= TOLERANCE:
        raise UserError(
            f"onnxruntime differs from torch by {worst:.2g}, more than {TOLERANCE:g}; leave the graph out with --no-onnx"
        )
    return worst


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open a graph on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_images(shape: tuple[int, ...]) -> torch.Tensor:
    """Return images of smooth blobs, whole numbers from 0 to 255, the same each time; float32."""
    coarse = np.random.default_rng(0).random((*shape[:2], 8, 8))
    images = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=shape[2:], mode="bicubic")
    return (255 * images.clamp(0, 1) ** 2).round().float()
