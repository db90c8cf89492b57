"""Exported graphs against the pipeline's own prediction. Skipped without the optional packages."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx onnxruntime")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnx onnxruntime")

from common.classes import CLASS_NAMES
from common.data.sources import CHANNELS
from common.errors import UserError
from common.export import onnx
from common.predict.model import Member, Model
from common.recipes import get_recipe
from common.train.dataset import Normalisation
from common.train.dataset import standardise as standardised
from common.train.hardware import Hardware
from common.train.networks import build_model
from common.train.predict import mean_probabilities, views

CPU = Hardware(torch.device("cpu"))
DESCRIPTION = {
    "name": "tiny",
    "licence": "MIT",
    "channels": [{"name": name} for name in CHANNELS],
    "classes": list(CLASS_NAMES),
}


def member(name, fold, weight, *settings):
    recipe = get_recipe(name, settings)

    def load(hardware):
        torch.manual_seed(fold)
        network = build_model(recipe, 28)
        for module in network.modules():  # as after training: statistics other than 0 and 1
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
        return network.eval(), Normalisation((0.1, 0.05, 0.06, 0.08), (0.2, 0.1, 0.15, 0.2))

    return Member(name, fold, recipe, weight, load)


def expected(model, images):
    """Predict as stages 05 to 07 do: uint8 images, one view after the other."""
    found = []
    for one in model.members:
        network, normalise = one.load(CPU)
        own = np.stack([standardised(image) for image in images]) if one.recipe.standardised else images
        with torch.inference_mode():
            batch = normalise(torch.from_numpy(own), CPU.device)
            logits = torch.stack([network(view(batch)) for view in views(model.tta)])
        found.append(mean_probabilities(logits))
    return model.combined(np.stack(found))


def run(path, images):
    return onnx.open_session(path).run(None, {"images": images.astype(np.float32)})[0]


@pytest.mark.parametrize("tta", ["none", "dihedral"])
def test_a_graph_is_the_mean_of_all_networks_and_views(tmp_path, tta):
    members = (
        member("demo", 0, 0.3, "buffers=16"),
        member("demo", 1, 0.3, "buffers=16"),
        member("small_plus", 0, 0.4, "buffers=16"),
    )
    model = Model("tiny", tmp_path, members, tta=tta)
    (record,) = onnx.write_graphs(model, tmp_path, CPU, DESCRIPTION)
    assert record["file"] == "model.onnx" and record["side"] == 192 and record["share"] == 1.0
    assert record["members"] == ["demo fold 0", "demo fold 1", "small_plus fold 0"]
    for shape in ((1, 4, 192, 192), (3, 4, 100, 140)):
        images = onnx.test_images(shape).numpy().astype(np.uint8)
        np.testing.assert_allclose(run(tmp_path / "model.onnx", images), expected(model, images), atol=2e-6)
    props = {row.key: row.value for row in onnx.onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(props["classes"])[27] == "Rods & rings" and props["licence"] == "MIT"


def test_networks_of_several_sizes_become_graphs_whose_shares_combine(tmp_path):
    members = (member("demo_gapnet", 0, 0.75), member("demo_gapnet", 1, 0.25, "image_size=768", "crop_size=512"))
    model = Model("tiny", tmp_path, members, tta="none")
    records = onnx.write_graphs(model, tmp_path, CPU, DESCRIPTION)
    assert [(row["file"], row["share"]) for row in records] == [("model-128.onnx", 0.75), ("model-96.onnx", 0.25)]
    images = onnx.test_images((2, 4, 128, 128)).numpy().astype(np.uint8)
    for row, one in zip(records, members, strict=True):
        alone = Model("tiny", tmp_path, (replace(one, weight=1.0),), tta="none")
        np.testing.assert_allclose(run(tmp_path / row["file"], images), expected(alone, images), atol=2e-6)


def test_standardised_images_are_those_of_training():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 60, 52)).astype(np.uint8)
    images[0, 1], images[1] = 7, images[1] // 16
    found = onnx.standardise(torch.from_numpy(images).float()).numpy()
    np.testing.assert_array_equal(found, np.stack([standardised(image) for image in images]))


def test_a_graph_that_differs_is_refused(tmp_path):
    model = Model("tiny", tmp_path, (member("demo_gapnet", 0, 1.0),))
    onnx.write_graph(onnx.build_graph(list(model.members), "none", CPU), tmp_path / "a.onnx", DESCRIPTION)
    other = onnx.build_graph([member("demo_gapnet", 5, 1.0)], "none", CPU)
    with pytest.raises(UserError, match="onnxruntime differs from torch by .*, more than 0.0001; leave the graph out"):
        onnx.check_graph(other, tmp_path / "a.onnx", 128)
