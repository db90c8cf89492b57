import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from common.errors import UserError
from common.recipes import CHOICES, OWN_POOLING, RECIPES, Recipe, get_recipe
from common.report import heat_maps
from common.train.networks import (
    ENCODERS,
    AdaptiveConcatPool2d,
    GapNetEncoder,
    PadTo,
    build_encoder,
    build_head,
    build_model,
    count_parameters,
    densenet50,
    pretrainedmodel,
    stem,
    widen_stem,
)
from common.train.optimizers import param_groups
from tests.conftest import ROOT

BACKBONES = [name for name in CHOICES["encoder"] if name not in OWN_POOLING]


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 1, 1), (2, 4, 6, 6)])
def test_pooling_is_maximum_then_average_for_any_size(shape):
    x = torch.randn(shape)
    pooled = AdaptiveConcatPool2d()(x)
    flat = x.reshape(shape[0], shape[1], -1)
    torch.testing.assert_close(pooled, torch.cat([flat.max(dim=2).values, flat.sum(dim=2) / flat.shape[2]], dim=1))
    torch.testing.assert_close(
        pooled, torch.cat([nn.AdaptiveMaxPool2d(1)(x), nn.AdaptiveAvgPool2d(1)(x)], dim=1).flatten(1)
    )


@pytest.mark.parametrize("fourth", ["red", "zeros", "mean"])
def test_the_wide_stem_sees_rgb_as_before(fourth):
    narrow = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
    wide = widen_stem(narrow, fourth)
    rgb = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(wide(torch.cat([rgb, torch.zeros(2, 1, 20, 20)], dim=1)), narrow(rgb))
    expected = {"red": narrow.weight[:, 0], "zeros": torch.zeros(8, 7, 7), "mean": narrow.weight.mean(dim=1)}[fourth]
    torch.testing.assert_close(wide.weight[:, 3], expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_encoder_gives_the_features_of_the_unchanged_network(name):
    torch.manual_seed(0)
    encoder, features = build_encoder(Recipe(encoder=name))
    torch.manual_seed(0)
    unchanged = (
        ENCODERS[name].build()[0].eval() if name in ("resnet10_narrow", "densenet50") else pretrainedmodel(name).eval()
    )
    rgb = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        mine = encoder.eval()(torch.cat([rgb, torch.zeros(1, 1, 96, 96)], dim=1))
        expected = unchanged.features(rgb) if hasattr(unchanged, "features") else unchanged(rgb)
    assert features == mine.shape[1] and expected.std() > 0
    torch.testing.assert_close(mine, expected.relu() if name == "densenet121" else expected)


def test_small_images_stand_in_the_middle_of_zeros_and_large_ones_are_left_alone():
    small = PadTo(7)(torch.ones(1, 1, 4, 9))
    assert small.shape == (1, 1, 7, 9) and small[0, 0, :, 0].tolist() == [0, 1, 1, 1, 1, 0, 0]
    large = torch.randn(1, 1, 8, 8)
    assert PadTo(7)(large).equal(large)


def test_weights_depend_on_the_seed_alone_also_the_first_time():
    code = (
        "import torch; from common.train.networks import pretrainedmodel\n"
        "first, second = (torch.manual_seed(0) and pretrainedmodel('resnet50').conv1.weight for _ in range(2))\n"
        "assert torch.equal(first, second)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_weights_with_four_channels_keep_their_own_stem():
    torch.manual_seed(0)
    trained = build_encoder(Recipe(encoder="resnet18"))[0]
    with torch.no_grad():
        trained.conv1.weight[:, 3] = 7
    again = build_encoder(Recipe(encoder="resnet18", fourth_channel="zeros"), trained.state_dict())[0]
    assert all(
        torch.equal(a, b) for a, b in zip(trained.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), "missing tensor layer1.0.conv1.weight .1 in all."),
        (lambda state: state.update(more=torch.ones(1)), "unexpected tensor more"),
        (
            lambda state: state.update({"layer1.0.conv1.weight": torch.ones(1)}),
            "tensor of another shape, layer1.0.conv1",
        ),
        (
            lambda state: state.update({"conv1.weight": torch.ones(64, 5, 7, 7)}),
            "tensor of another shape, conv1.weight",
        ),
    ],
)
def test_weights_of_another_network_are_refused(change, message):
    state = build_encoder(Recipe(encoder="resnet18"))[0].state_dict()
    change(state)
    with pytest.raises(UserError, match=f"these are not weights of resnet18: {message}"):
        build_encoder(Recipe(encoder="resnet18"), state)


def test_gapnet_pl_has_the_published_parameters_and_levels():
    assert count_parameters(get_recipe("gapnet_pl"), 28) == 630_076
    model = build_model(get_recipe("gapnet_pl"), 28)
    assert sum(p.numel() for p in model.parameters()) == 630_076
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in model.modules())
    assert [layer.p for layer in model.head if isinstance(layer, nn.AlphaDropout)] == [0.3, 0.3]
    images = torch.randn(2, 4, 96, 96)
    pooled = model.encoder(images)
    a = model.encoder.a(images)
    b = model.encoder.b(a)
    assert pooled.shape == (2, 224) and (a.shape[1:], b.shape[1:]) == ((32, 24, 24), (64, 6, 6))
    torch.testing.assert_close(
        pooled, torch.cat([a.flatten(2).mean(2), b.flatten(2).mean(2), model.encoder.c(b).flatten(2).mean(2)], dim=1)
    )


def test_gapnet_pl_plus_has_two_more_convolutions_before_the_first_level():
    plain, plus = (sum(isinstance(m, nn.Conv2d) for m in GapNetEncoder(wider).a) for wider in (False, True))
    assert (plain, plus) == (1, 3)
    more = 2 * (32 * 32 * 9 + 32)
    assert count_parameters(get_recipe("gapnet_pl_plus"), 28) == 630_076 + more


def test_selu_keeps_activations_normalised_through_gapnet():
    torch.manual_seed(0)
    x = GapNetEncoder(False).a[:2](torch.randn(4, 4, 96, 96))
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.2


def test_densenet50_has_49_layers_a_buffer_and_the_parameters_of_resnet18():
    layers = [module for module in densenet50().modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 49 and len(get_recipe("densenet50").buffers) == 1
    reference = sum(p.numel() for p in resnet18().parameters())
    assert count_parameters(get_recipe("densenet50"), 28) == pytest.approx(reference, rel=0.05)


def test_the_head_of_resnet50_is_the_papers():
    head = build_head(4096, 28, get_recipe("resnet50"))
    assert [type(layer).__name__ for layer in head] == ["BatchNorm1d", "Linear", "ReLU", "Dropout", "Linear"]
    assert (head[1].in_features, head[1].out_features, head[3].p, head[4].out_features) == (4096, 1024, 0.5, 28)


def test_two_buffers_and_the_other_order():
    head = build_head(4096, 28, Recipe(buffers=(4096, 1024), dropouts=(0.25, 0.5), head_order="dropout-linear-relu"))
    assert [type(layer).__name__ for layer in head] == ["BatchNorm1d", "Dropout", "Linear", "ReLU"] * 2 + ["Linear"]
    assert [layer.p for layer in head if isinstance(layer, nn.Dropout)] == [0.25, 0.5]


def test_selu_blocks_have_no_batchnorm():
    head = build_head(224, 28, get_recipe("gapnet_pl"))
    assert [type(layer).__name__ for layer in head] == ["Linear", "SELU", "AlphaDropout"] * 2 + ["Linear"]


@pytest.mark.parametrize(("pooling", "first"), [("acp", 4096), ("average", 2048)])
def test_the_original_network_has_average_pooling_and_one_linear_layer(pooling, first):
    model = build_model(Recipe(pooling=pooling, buffers=(), dropouts=()), 28)
    assert [type(layer).__name__ for layer in model.head] == ["Linear"] and model.head[0].in_features == first
    if pooling == "average":
        x = torch.randn(2, 8, 3, 5)
        torch.testing.assert_close(model.pool(x), x.mean(dim=(2, 3)))


LEVELS = [name for name, row in ENCODERS.items() if row.levels]


@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_pooled_each_and_put_side_by_side(name):
    recipe = Recipe(encoder=name, pooling="levels", buffers=(8,), image_size=64, crop_size=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(recipe, 28).eval()
    images, maps = torch.randn(2, 4, 64, 64), {}
    for level in ("layer2", "layer3", "layer4"):
        model.encoder.get_submodule(level).register_forward_hook(lambda _, __, x, level=level: maps.update({level: x}))
    with torch.inference_mode():
        found = model(images)
        parts = [part for x in maps.values() for part in (x.amax(dim=(2, 3)), x.mean(dim=(2, 3)))]
        torch.testing.assert_close(found, model.head(torch.cat(parts, dim=1)))
        torch.testing.assert_close(maps["layer4"], model.encoder(images))
    assert list(maps) == ["layer2", "layer3", "layer4"] and list(model.levels) == list(maps)
    assert heat_maps.last_map(model) is model.encoder.layer4


def test_a_network_that_computes_its_levels_again_has_the_same_gradients():
    images, found = torch.randn(4, 4, 96, 96), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(
            replace(get_recipe("demo"), pooling="levels", dropouts=(0.0,), checkpointing=checkpointing), 28
        )
        model(images).square().sum().backward()
        found.append([p.grad for p in model.parameters()] + [b.clone() for b in model.buffers()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("encoder", ["densenet121", "timm/resnet10t"])
def test_an_encoder_without_levels_says_which_have_them(encoder):
    with pytest.raises(UserError, match=rf"pooling=levels with encoder={encoder}; these can: .*resnet50.*pooling=acp"):
        build_model(Recipe(encoder=encoder, pooling="levels"), 28)


# One recipe per network: the others train the same networks in another way.
NETWORKS = list({(r.encoder, r.pooling, r.buffers, r.head_order): name for name, r in RECIPES.items()}.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_any_input_size(name):
    model = build_model(get_recipe(name), 28).eval()
    with torch.inference_mode():
        for size in ((32, 32), (97, 64)):
            assert model(torch.randn(1, 4, *size)).shape == (1, 28)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("rates", [(1.0,), (1.0, 2.0), (1.0, 2.0, 3.0)])
def test_every_parameter_is_in_one_group(name, rates):
    with torch.device("meta"):
        model = build_model(get_recipe(name), 28)
    groups = param_groups(model, rates)
    assert [group["top_lr"] for group in groups] == list(rates) and all(group["params"] for group in groups)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "early", "late"),
    [
        ("resnet101", "layer2", "layer3"),
        ("senet154", "layer2", "layer3"),
        ("densenet121", "transition2", "denseblock3"),
        ("inceptionv4", "10", "11"),
        ("gapnet_pl", "b", "c"),
    ],
)
def test_three_groups_split_in_the_middle_of_the_encoder(name, early, late):
    with torch.device("meta"):
        model = build_model(get_recipe(name), 28)
    groups = [{id(p) for p in group["params"]} for group in param_groups(model, (1.0, 2.0, 3.0))]
    assert {id(p) for p in model.encoder.get_submodule(early).parameters()} <= groups[0]
    assert {id(p) for p in model.encoder.get_submodule(late).parameters()} <= groups[1]
    assert {id(p) for p in model.head.parameters()} == groups[2]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_stem_is_the_first_convolution(name):
    with torch.device("meta"):
        encoder = build_encoder(Recipe(encoder=name))[0]
    assert (
        stem(encoder)[0] in ("conv1", "conv1.0", "layer0.conv1", "conv0", "0.conv", "0")
        and stem(encoder)[1].in_channels == 4
    )
