import subprocess
import sys

import pytest
import torch
from torch import nn

from common.models import AdaptiveConcatPool2d, build_encoder, build_head, build_model, param_groups, resnet, widen_stem
from common.recipes import Recipe, get_recipe
from tests.conftest import ROOT


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 1, 1), (2, 4, 6, 6)])
def test_pooling_is_maximum_then_average_for_any_size(shape):
    x = torch.randn(shape)
    pooled = AdaptiveConcatPool2d()(x)
    flat = x.reshape(shape[0], shape[1], -1)
    torch.testing.assert_close(pooled, torch.cat([flat.max(dim=2).values, flat.sum(dim=2) / flat.shape[2]], dim=1))
    torch.testing.assert_close(pooled, torch.cat([nn.AdaptiveMaxPool2d(1)(x), nn.AdaptiveAvgPool2d(1)(x)], dim=1).flatten(1))


@pytest.mark.parametrize("fourth", ["red", "zeros", "mean"])
def test_the_wide_stem_sees_rgb_as_before(fourth):
    narrow = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
    wide = widen_stem(narrow, fourth)
    rgb = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(wide(torch.cat([rgb, torch.zeros(2, 1, 20, 20)], dim=1)), narrow(rgb))
    expected = {"red": narrow.weight[:, 0], "zeros": torch.zeros(8, 7, 7), "mean": narrow.weight.mean(dim=1)}[fourth]
    torch.testing.assert_close(wide.weight[:, 3], expected)


def test_the_encoder_gives_the_features_of_the_unchanged_network():
    torch.manual_seed(0)
    encoder, features = build_encoder(Recipe())
    torch.manual_seed(0)
    unchanged = resnet("resnet50").eval()
    rgb = torch.randn(2, 3, 64, 64)
    mine = encoder.eval()(torch.cat([rgb, torch.zeros(2, 1, 64, 64)], dim=1))
    assert features == mine.shape[1] == 2048
    torch.testing.assert_close(mine, unchanged.features(rgb))


def test_weights_depend_on_the_seed_alone_also_the_first_time():
    code = ("import torch; from common.models import resnet\n"
            "first, second = (torch.manual_seed(0) and resnet('resnet50').conv1.weight for _ in range(2))\n"
            "assert torch.equal(first, second)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_head_of_resnet50_is_the_papers():
    head = build_head(4096, 28, get_recipe("resnet50"))
    assert [type(layer).__name__ for layer in head] == ["BatchNorm1d", "Linear", "ReLU", "Dropout", "Linear"]
    assert (head[1].in_features, head[1].out_features, head[3].p, head[4].out_features) == (4096, 1024, 0.5, 28)


def test_two_buffers_and_the_other_order():
    head = build_head(4096, 28, Recipe(buffers=(4096, 1024), dropouts=(0.25, 0.5), head_order="dropout-linear-relu"))
    assert [type(layer).__name__ for layer in head] == ["BatchNorm1d", "Dropout", "Linear", "ReLU"] * 2 + ["Linear"]
    assert [layer.p for layer in head if isinstance(layer, nn.Dropout)] == [0.25, 0.5]


@pytest.mark.parametrize("name", ["resnet10_narrow", "resnet18", "resnet50"])
@pytest.mark.parametrize("size", [64, 97])
def test_any_input_size_gives_28_logits(name, size):
    model = build_model(Recipe(encoder=name, buffers=(64,)), 28).eval()
    assert model(torch.randn(2, 4, size, size)).shape == (2, 28)


@pytest.mark.parametrize("rates", [(1.0,), (1.0, 2.0), (1.0, 2.0, 3.0)])
def test_every_parameter_is_in_one_group(rates):
    model = build_model(Recipe(encoder="resnet10_narrow"), 28)
    groups = param_groups(model, rates)
    assert [group["top_lr"] for group in groups] == list(rates)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_groups_split_at_the_head_and_before_layer3():
    model = build_model(Recipe(encoder="resnet10_narrow"), 28)
    early, late, head = param_groups(model, (1.0, 2.0, 3.0))
    assert any(p is model.encoder.layer2[0].conv1.weight for p in early["params"])
    assert any(p is model.encoder.layer3[0].conv1.weight for p in late["params"])
    assert any(p is model.head[-1].bias for p in head["params"])
