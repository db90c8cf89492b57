"""Encoders for four channels, the paper's head, and its layer groups."""

import warnings
from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from common.recipes import Recipe


class AdaptiveConcatPool2d(nn.Module):
    """Concatenate global max and average pooling: (n, c, h, w) -> (n, 2c), maximum first, for any h and w."""

    def forward(self, x):
        return torch.cat([x.amax(dim=(2, 3)), x.mean(dim=(2, 3))], dim=1)


class Classifier(nn.Module):
    """Encoder, adaptive concat pooling and head: (n, 4, h, w) images -> (n, n_classes) logits."""

    def __init__(self, encoder: nn.Sequential, head: nn.Sequential):
        super().__init__()
        self.encoder = encoder
        self.pool = AdaptiveConcatPool2d()
        self.head = head

    def forward(self, x):
        x = self.encoder(x)  # (n, c, h / 32, w / 32)
        x = self.pool(x)  # (n, 2c)
        return self.head(x)


def resnet(name: str) -> nn.Module:
    """Return a ResNet by name, random weights, three input channels."""
    if name == "resnet10_narrow":
        return resnet10_narrow()
    with torch.random.fork_rng(devices=[]):  # its import draws random numbers; ours must not depend on that
        import pretrainedmodels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision with arguments that are deprecated there
        return getattr(pretrainedmodels, name)(num_classes=1000, pretrained=None)


def resnet10_narrow() -> ResNet:
    """Return a ResNet for images of about 100 pixels: one block a stage, 16 to 128 channels, no early max pooling."""
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.conv1 = nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False)
    network.bn1, network.maxpool = nn.BatchNorm2d(16), nn.Identity()
    network.inplanes = 16
    for stage, width in enumerate((16, 32, 64, 128), start=1):
        setattr(network, f"layer{stage}", network._make_layer(BasicBlock, width, 1, stride=1 if stage == 1 else 2))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def widen_stem(convolution: nn.Conv2d, fourth_channel: str) -> nn.Conv2d:
    """Return the first convolution for four channels: RGB weights kept, yellow's copied from red, their mean, or zero."""
    wide = nn.Conv2d(4, convolution.out_channels, convolution.kernel_size, convolution.stride, convolution.padding,
                     bias=convolution.bias is not None)
    rgb = convolution.weight.detach()
    extra = {"red": rgb[:, :1], "mean": rgb.mean(dim=1, keepdim=True), "zeros": torch.zeros_like(rgb[:, :1])}
    with torch.no_grad():
        wide.weight.copy_(torch.cat([rgb, extra[fourth_channel]], dim=1))
        if convolution.bias is not None:
            wide.bias.copy_(convolution.bias)
    return wide


def build_encoder(recipe: Recipe) -> tuple[nn.Sequential, int]:
    """Return the convolutional part with a 4-channel stem, under its own parameter names, and its feature count."""
    network = resnet(recipe.encoder)
    parts = OrderedDict((name, getattr(network, name)) for name in
                        ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"))
    parts["conv1"] = widen_stem(parts["conv1"], recipe.fourth_channel)
    return nn.Sequential(parts), feature_count(parts["layer4"])


def feature_count(stage: nn.Module) -> int:
    """Return the channels that a ResNet stage puts out: those of its last normalisation in the main path."""
    block = stage[-1]
    return (block.bn3 if hasattr(block, "bn3") else block.bn2).num_features


def build_head(features: int, n_classes: int, recipe: Recipe) -> nn.Sequential:
    """Return the buffering layers, each a block of decreasing width, and the last linear layer."""
    layers, width = [], features
    for units, dropout in zip(recipe.buffers, recipe.dropouts, strict=True):
        linear, relu, drop = nn.Linear(width, units), nn.ReLU(inplace=True), nn.Dropout(dropout)
        order = [linear, relu, drop] if recipe.head_order == "linear-relu-dropout" else [drop, linear, relu]
        layers += [nn.BatchNorm1d(width), *order]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, n_classes))


def build_model(recipe: Recipe, n_classes: int) -> Classifier:
    """Return the recipe's network with random weights, drawn from torch's global generator."""
    encoder, features = build_encoder(recipe)
    return Classifier(encoder, build_head(2 * features, n_classes, recipe))


def param_groups(model: Classifier, rates: tuple[float, ...]) -> list[dict]:
    """Return optimizer groups with the top learning rates `rates`, first layers first.

    One rate: all layers. Two: encoder, head. Three: encoder before layer3, encoder from layer3 on, head.
    """
    encoder = list(model.encoder.named_children())
    split = [name for name, _ in encoder].index("layer3")
    parts = [[module for _, module in encoder[:split]], [module for _, module in encoder[split:]], [model.head]]
    if len(rates) < 3:
        parts = [parts[0] + parts[1], parts[2]]
    if len(rates) == 1:
        parts = [parts[0] + parts[1]]
    return [{"params": [p for module in modules for p in module.parameters()], "lr": rate, "top_lr": rate}
            for modules, rate in zip(parts, rates, strict=True)]
