"""Encoders for four channels, the paper's head, GapNet-PL, and layer groups."""

import math
import warnings
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from common.recipes import Recipe

# Names of the encoders' children at which three layer groups split: the second half of the encoder begins there.
SPLITS = ("layer3", "denseblock3", "11", "c")
INCEPTION_MINIMUM = 75  # pixels: smaller images vanish between its unpadded convolutions


class AdaptiveConcatPool2d(nn.Module):
    """Concatenate global max and average pooling: (n, c, h, w) -> (n, 2c), maximum first, for any h and w."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.amax(dim=(2, 3)), x.mean(dim=(2, 3))], dim=1)


class PadTo(nn.Module):
    """Put images smaller than `minimum` pixels into the middle of zeros: (n, c, h, w) -> at least minimum a side."""

    def __init__(self, minimum: int) -> None:
        super().__init__()
        self.minimum = minimum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (max(0, self.minimum - side) for side in x.shape[-2:])
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class Classifier(nn.Module):
    """Encoder, global pooling and head: (n, 4, h, w) images -> (n, n_classes) logits."""

    def __init__(self, encoder: nn.Sequential, pool: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x)  # (n, c, h / 32, w / 32)
        x = self.pool(x)  # (n, 2c) by adaptive concat pooling
        return self.head(x)


class GapNetEncoder(nn.Sequential):
    """The convolutions of GapNet-PL (Rumetshofer et al., ICLR 2019) and its pooled features: (n, 4, h, w) -> (n, 224).

    The global averages of three levels (32, 64 and 128 channels) are concatenated, so that fine structure reaches
    the head beside context.
    wider : two more convolutions of 32 channels before the first level, as Zhang et al. add "in the first step"
    """

    a: nn.Sequential
    b: nn.Sequential
    c: nn.Sequential

    def __init__(self, wider: bool) -> None:
        def convolutions(channels: int, *widths: int, stride: int = 1) -> list[nn.Module]:
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, stride if not layers else 1, padding=1), nn.SELU()]
                channels = width
            return layers

        super().__init__(
            OrderedDict(
                a=nn.Sequential(
                    *convolutions(4, *[32] * (3 if wider else 1), stride=2), nn.MaxPool2d(2, ceil_mode=True)
                ),
                b=nn.Sequential(*convolutions(32, 64, 64, 64, 64, stride=2), nn.MaxPool2d(2, ceil_mode=True)),
                c=nn.Sequential(*convolutions(64, 128, 128, 128)),
            )
        )
        self_normalise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)  # (n, 32, h / 4, w / 4)
        b = self.b(a)  # (n, 64, h / 16, w / 16)
        c = self.c(b)  # (n, 128, h / 16, w / 16)
        return torch.cat([level.mean(dim=(2, 3)) for level in (a, b, c)], dim=1)


def self_normalise(network: nn.Module) -> None:
    """Draw weights with variance 1 / fan-in and zero biases, which SELU needs to keep activations normalised."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# --- encoders ----------------------------------------------------------------------------------------------


def pretrainedmodel(name: str) -> nn.Module:
    """Return a network of the package pretrainedmodels with random weights and three input channels."""
    with torch.random.fork_rng(devices=[]):  # its import draws random numbers; ours must not depend on that
        import pretrainedmodels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision with arguments that are deprecated there
        return getattr(pretrainedmodels, name)(num_classes=1000, pretrained=None)


def resnet10_narrow() -> nn.Module:
    """Return a ResNet for images of 100 to 250 pixels: one block a stage, 16 to 128 channels, halved by max pooling.

    Small bright spots, which strided convolutions learn to see only with much data, pass a maximum unharmed. The stem
    pools before it normalises, which takes a fifth off the time of a training step.
    """
    from torchvision.models.resnet import BasicBlock, ResNet  # two seconds, spared where nothing is built

    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.conv1 = nn.Sequential(nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False), network.maxpool)
    network.bn1, network.maxpool = nn.BatchNorm2d(16), nn.Identity()
    network.inplanes = 16
    for stage, width in enumerate((16, 32, 64, 128), start=1):
        layer = network._make_layer(BasicBlock, width, 1)
        setattr(network, f"layer{stage}", layer if stage == 1 else layer.insert(0, nn.MaxPool2d(2)))
    network.fc = nn.Linear(128, 1000)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def densenet50() -> nn.Module:
    """Return a DenseNet-BC with 2 * 22 + 5 = 49 layers; with its buffering layer it has about ResNet18's parameters."""
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=80, block_config=(3, 6, 8, 5), num_init_features=160)


def backbone(name: str) -> tuple[nn.Sequential, int]:
    """Return the convolutional part of a three-channel network, under its own parameter names, and its feature count."""
    with torch.device("cpu"):  # torch before 2.7 cannot load what torchvision needs of it under the meta device
        import torchvision  # noqa: F401

    own = {"resnet10_narrow": resnet10_narrow, "densenet50": densenet50}
    network = own[name]() if name in own else pretrainedmodel(name)
    features = next(module for module in reversed(list(network.modules())) if isinstance(module, nn.Linear)).in_features
    if name.startswith("densenet"):
        # Its features end in a BatchNorm; the network itself puts a ReLU behind them.
        parts = [*network.get_submodule("features").named_children(), ("relu", nn.ReLU(inplace=True))]
    elif name == "inceptionv4":
        parts = [("pad", PadTo(INCEPTION_MINIMUM)), *network.get_submodule("features").named_children()]
    else:
        stages = ("conv1", "bn1", "relu", "maxpool", "layer0", "layer1", "layer2", "layer3", "layer4")
        parts = [(part, module) for part, module in network.named_children() if part in stages]
    return nn.Sequential(OrderedDict(parts)), features


def widen_stem(convolution: nn.Conv2d, fourth_channel: str) -> nn.Conv2d:
    """Return the first convolution for four channels: RGB weights kept, yellow's copied from red, their mean, or zero."""
    geometry: dict[str, Any] = {name: getattr(convolution, name) for name in ("kernel_size", "stride", "padding")}
    wide = nn.Conv2d(4, convolution.out_channels, **geometry, bias=convolution.bias is not None)
    rgb = convolution.weight.detach()
    extra = {"red": rgb[:, :1], "mean": rgb.mean(dim=1, keepdim=True), "zeros": torch.zeros_like(rgb[:, :1])}
    with torch.no_grad():
        wide.weight.copy_(torch.cat([rgb, extra[fourth_channel]], dim=1))
        if convolution.bias is not None and wide.bias is not None:
            wide.bias.copy_(convolution.bias)
    return wide


def stem(encoder: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return the first convolution and its name."""
    return next((name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d))


def build_encoder(recipe: Recipe, weights: dict | None = None) -> tuple[nn.Sequential, int]:
    """Return the encoder with a 4-channel stem and its feature count.

    weights : parameters under the encoder's names, for three input channels or four; None for random ones
    Raises UserError where the weights are another network's.
    """
    encoder: nn.Sequential
    if recipe.encoder.startswith("gapnet"):
        encoder, features = GapNetEncoder(wider=recipe.encoder.endswith("plus")), 224
    else:
        encoder, features = backbone(recipe.encoder)
    name, first = stem(encoder)
    fits = weights and f"{name}.weight" in weights and weights[f"{name}.weight"].shape[1:2] == (first.in_channels,)
    if weights and fits:
        load_weights(encoder, weights, recipe.encoder)
    if first.in_channels == 3:
        encoder.set_submodule(name, widen_stem(first, recipe.fourth_channel))
    if weights and not fits:
        load_weights(encoder, weights, recipe.encoder)
    return encoder, features


def load_weights(encoder: nn.Module, weights: dict, name: str) -> None:
    """Load parameters into an encoder; raises UserError where names or shapes differ."""
    own = encoder.state_dict()
    needed = {key for key in own if not key.endswith("num_batches_tracked")}  # old files do not have those
    shapes = {key for key in needed & weights.keys() if own[key].shape != weights[key].shape}
    for what, keys in (
        ("lack", needed - weights.keys()),
        ("have too much, such as", weights.keys() - own.keys()),
        ("have other shapes, such as", shapes),
    ):
        if keys:
            raise UserError(
                f"these are not weights of {name}: they {what} {sorted(keys)[0]} ({len(keys)} in all); "
                "give --pretrained the file of that network"
            )
    encoder.load_state_dict(weights, strict=False)


# --- heads and whole networks ------------------------------------------------------------------------------


def build_pool(kind: str) -> nn.Module:
    """Return the global pooling: acp, average, or none behind an encoder with its own."""
    if kind == "average":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return AdaptiveConcatPool2d() if kind == "acp" else nn.Identity()


def build_head(features: int, n_classes: int, recipe: Recipe) -> nn.Sequential:
    """Return the buffering layers, each a block of decreasing width, and the last linear layer."""
    layers, width = [], features
    for units, dropout in zip(recipe.buffers, recipe.dropouts, strict=True):
        linear, norm, drop = nn.Linear(width, units), nn.BatchNorm1d(width), nn.Dropout(dropout)
        layers += {
            "linear-relu-dropout": [norm, linear, nn.ReLU(inplace=True), drop],
            "dropout-linear-relu": [norm, drop, linear, nn.ReLU(inplace=True)],
            "linear-selu-dropout": [linear, nn.SELU(), nn.AlphaDropout(dropout)],
        }[recipe.head_order]
        width = units
    head = nn.Sequential(*layers, nn.Linear(width, n_classes))
    if recipe.head_order == "linear-selu-dropout":
        self_normalise(head)
    return head


def build_model(recipe: Recipe, n_classes: int, weights: dict | None = None) -> Classifier:
    """Return the recipe's network; what `weights` does not give is drawn from torch's global generator."""
    encoder, features = build_encoder(recipe, weights)
    pooled = 2 * features if recipe.pooling == "acp" else features
    return Classifier(encoder, build_pool(recipe.pooling), build_head(pooled, n_classes, recipe))


def count_parameters(recipe: Recipe, n_classes: int) -> int:
    """Return the number of trained parameters, without spending memory on them."""
    with torch.device("meta"):
        return sum(math.prod(p.shape) for p in build_model(recipe, n_classes).parameters())
