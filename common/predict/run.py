"""Predict new images: each batch through all networks, kept on disk as soon as it is done."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from common.artifacts.arrays import read_arrays
from common.artifacts.files import clear_leftovers, read_json, write_json, writing
from common.artifacts.stage import digest
from common.classes import N_CLASSES
from common.data.options import WHOLE, Levels
from common.predict.batches import FieldBatch, NewImages, Windows, fill_missing, kind_of, load_batches, plan_batches
from common.predict.inputs import NewImage
from common.predict.model import Member, Model
from common.predict.options import FILLED, WINDOWS
from common.process import stopping
from common.process.parallel import run_jobs
from common.process.progress import progress
from common.train.dataset import Normalisation
from common.train.fold_data import image_set
from common.train.hardware import Fitting, Hardware, HardwareOptions, choose_hardware
from common.train.predict import View, in_parts_that_fit, outputs_of_views, predict_logits, views

SHARD = 64  # images of a job where several jobs work at once
# How the probabilities of a field's windows, (..., m, 28), become the field's: their mean, or the largest of them.
POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda probs: probs.mean(dim=1),
    "max": lambda probs: probs.amax(dim=1),
}


@dataclass(frozen=True)
class Settings:
    """What changes answers, beside the model and the images.

    tta : none, dihedral, or None for the model's own
    windows : a row of POOLED
    filled : missing channel -> its filling, a row of FILLINGS
    """

    levels: Levels = WHOLE
    tta: str | None = None
    windows: str = WINDOWS[0]
    filled: Mapping[str, str] = field(default_factory=lambda: dict(FILLED))

    def record(self) -> dict:
        return {**asdict(self), "levels": list(self.levels)}


@dataclass(frozen=True)
class Shard:
    """Some images to predict in one process.

    parts : folder of finished batches
    """

    model: Model
    images: list[NewImage]
    settings: Settings
    parts: Path
    batch_size: int
    hardware: HardwareOptions = HardwareOptions()

    @property
    def key(self) -> str:
        """Identifies what finished batches were made with."""
        return digest([self.model.digest, self.settings.record()])


class WithFeatures(nn.Module):
    """A network that also returns what enters its last layer: (n, 4, h, w) -> (n, 28 + width)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.features: list[torch.Tensor] = []
        last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
        last.register_forward_pre_hook(lambda _, inputs: self.features.append(inputs[0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)
        return torch.cat([logits.float(), self.features.pop().float()], dim=1)


@dataclass
class Network:
    """A member on its device.

    outputs : function of images (n, 4, h, w) uint8 -> (n_views, n, 28 + width)
    means : mean grey level of each channel in its training images
    """

    member: Member
    outputs: Callable[[torch.Tensor], torch.Tensor]
    means: list[int]
    fitting: Fitting = field(default_factory=Fitting)


def model_views(model: Model, member: Member, tta: str | None) -> list[View]:
    """Return the views that a member predicts; the first one is the image itself, unturned."""
    return views(tta or model.tta, member.recipe.crop if model.view == "crops" else None)


def load_networks(model: Model, settings: Settings, hardware: Hardware) -> list[Network]:
    """Return all members on the device."""
    networks = []
    for member in model.members:
        network, normalise = member.load(hardware)
        outputs = outputs_of_views(WithFeatures(network), normalise, hardware, model_views(model, member, settings.tta))
        networks.append(Network(member, outputs, grey_levels(normalise)))
    return networks


def grey_levels(normalise: Normalisation) -> list[int]:
    """Return the mean of each channel that a network was trained on, in grey levels."""
    return [round(255 * mean) for mean in normalise.mean]


def embed_stored(work: Path, member: Member, rows: pd.DataFrame, options: HardwareOptions) -> np.ndarray:
    """Return what enters the last layer of a member for whole, unturned images of its work folder, (n, width)."""
    hardware = choose_hardware(options, training=False)
    network, normalise = member.load(hardware)
    images = image_set(work, member.recipe, rows)
    label = f"{member.label}: reference"
    outputs = predict_logits(WithFeatures(network), normalise, images, hardware, views("none"), label=label)
    return outputs[0, :, N_CLASSES:].numpy()


LOADED: dict[str, list[Network]] = {}  # by key of a shard: in this process, for its next shard


def predict_shard(shard: Shard, label: str | None = None, done: int = 0) -> None:
    """Predict the images of a shard; keep each batch, and the faults of images that could not be read.

    label : of the progress bar; None for no bar; done : images that an earlier run finished
    """
    hardware = choose_hardware(shard.hardware, training=False)
    if shard.key not in LOADED:
        LOADED.clear()
        LOADED[shard.key] = load_networks(shard.model, shard.settings, hardware)
    networks = LOADED[shard.key]
    kinds = tuple(dict.fromkeys(kind_of(member) for member in shard.model.members))
    dataset = NewImages(shard.images, kinds, shard.model.pixel_size, shard.settings.levels)
    batches = plan_batches(shard.images, shard.model, shard.batch_size)
    for batch in counted(load_batches(dataset, batches, hardware), len(shard.images), label, done):
        stopping.check()
        if batch.items:
            images = [shard.images[item.row] for item in batch.items]
            arrays = predict_batch(networks, batch, images, shard.model, shard.settings, shard.batch_size)
            save_part(shard.parts, shard.key, images, arrays)
        if batch.faulty:
            faults = {shard.images[item.row].Id: item.fault for item in batch.faulty}
            write_json(shard.parts / f"{digest(sorted(faults))[:24]}.json", faults)


def counted(batches: Iterator[FieldBatch], n: int, label: str | None, done: int) -> Iterator[FieldBatch]:
    """Yield batches, with a progress bar that counts images."""

    def each() -> Iterator[FieldBatch | None]:
        for batch in batches:
            yield batch
            yield from [None] * (len(batch.items) + len(batch.faulty) - 1)

    for batch in progress(each(), n + done, label or "", "images", done, quiet=not label):
        if batch is not None:
            yield batch


def predict_batch(
    networks: Sequence[Network],
    batch: FieldBatch,
    images: Sequence[NewImage],
    model: Model,
    settings: Settings,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Return the results of a batch of n images, by name.

    members : (n_members, n, 28) probabilities, means over views; spread : (n, 28) their standard deviation over members
        and views; agreement : (n,) share of members and views that alone would predict the same classes
    means : (n, 4) of the channels, 0 to 1; exposed : (n,) as JSON; windows : (n,) how many
    embedding_<k> : (n, width) what enters the last layer of member k for the unturned image, mean over windows
    """
    arrays: dict[str, np.ndarray] = {}
    single = []  # (n_views, n, 28) of each member
    for k, network in enumerate(networks):
        outputs, count = outputs_of_fields(network, batch, images, settings, batch_size)
        single.append(outputs[..., :N_CLASSES])
        arrays[f"embedding_{k}"], arrays["windows"] = outputs[0, :, N_CLASSES:].numpy(), count
    members = np.stack([probs.mean(dim=0).numpy() for probs in single])
    every = torch.cat(single).numpy()
    predicted = model.decide(model.combined(members))
    same = [(model.decide(probs) == predicted).all(axis=1) for probs in every]
    return {
        **arrays,
        "members": members,
        "spread": every.std(axis=0),
        "agreement": np.mean(same, axis=0, dtype=np.float32),
        "means": np.array([item.means for item in batch.items], np.float32),
        "exposed": np.array([json.dumps(item.exposed) for item in batch.items]),
    }


def outputs_of_fields(
    network: Network, batch: FieldBatch, images: Sequence[NewImage], settings: Settings, batch_size: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Return probabilities and features of each field, (n_views, n, 28 + width), and its number of windows, (n,)."""
    n = len(batch.items)
    parts, owners = [], []
    for some in batch.windows[kind_of(network.member)]:
        pixels = filled(some, images, network, settings)
        for first in range(0, len(pixels), batch_size):
            part = pixels[first : first + batch_size]
            parts.append(in_parts_that_fit(network.outputs, part, network.fitting).cpu())
        owners.append(some.owners)
    outputs, whose = torch.cat(parts, dim=1), np.concatenate(owners)
    outputs[..., :N_CLASSES] = outputs[..., :N_CLASSES].sigmoid()
    count = np.bincount(whose, minlength=n)
    if (count == 1).all():
        return outputs[:, np.argsort(whose)], count
    result = torch.empty(len(outputs), n, outputs.shape[2])
    for place in range(n):
        own = outputs[:, whose == place]
        result[:, place, :N_CLASSES] = POOLED[settings.windows](own[..., :N_CLASSES])
        result[:, place, N_CLASSES:] = own[..., N_CLASSES:].mean(dim=1)
    return result, count


def filled(some: Windows, images: Sequence[NewImage], network: Network, settings: Settings) -> torch.Tensor:
    """Return windows with their missing channels filled."""
    if not any(images[owner].missing for owner in some.owners):
        return some.images
    result = some.images.clone()
    for missing in {images[owner].missing for owner in some.owners} - {()}:
        rows = torch.tensor([images[owner].missing == missing for owner in some.owners])
        part = result[rows]
        fill_missing(part, missing, settings.filled, network.means)
        result[rows] = part
    return result


# --- all images --------------------------------------------------------------------------------------------


def predict_images(
    shard: Shard, cluster: str | None, size: int = SHARD
) -> tuple[dict[str, tuple[Path, int]], dict[str, str]]:
    """Predict all images that no earlier run has finished; return where the results are, and faults by Id.

    shard : with all images
    size : images of a job where several jobs work at once
    """
    for path in shard.parts.glob("*.json"):  # of an earlier run, whose files may be fine now
        path.unlink()
    places = finished(shard.parts, shard.key, shard.images)
    todo = replace(shard, images=[image for image in shard.images if image.Id not in places])
    if places:
        print(f"10_predict: {len(places)} of {len(shard.images)} images are finished already", flush=True)
    if todo.images and shard.hardware.jobs == 1 and not cluster:
        predict_shard(todo, "predicting", len(places))
    elif todo.images:
        firsts = range(0, len(todo.images), size)
        jobs = [(replace(todo, images=todo.images[first : first + size]),) for first in firsts]
        run_jobs(predict_shard, jobs, shard.hardware.jobs, cluster, "predicting", f"parts of {size} images")
    faults = {Id: text for path in shard.parts.glob("*.json") for Id, text in read_json(path).items()}
    return finished(shard.parts, shard.key, shard.images), faults


# --- finished batches --------------------------------------------------------------------------------------


def save_part(folder: Path, key: str, images: Sequence[NewImage], arrays: Mapping[str, np.ndarray]) -> None:
    """Keep the results of a batch."""
    states = [image.state for image in images]
    with writing(folder / f"{digest([key, states])[:24]}.npz") as temporary:
        own = {"key": np.array([key]), "ids": np.array([image.Id for image in images]), "states": np.array(states)}
        np.savez(temporary, **{**own, **arrays})  # type: ignore[arg-type]  # the stubs see a flag among the names


def read_part(path: Path, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Return the results of a batch, or those with the given names.

    {} for a file that is damaged or from elsewhere, whose images are then predicted again.
    """
    try:
        arrays = read_arrays(path, names)
        return arrays if {"key", "ids", "states"} <= arrays.keys() else {}
    except (OSError, ValueError):
        return {}


def finished(folder: Path, key: str, images: Sequence[NewImage]) -> dict[str, tuple[Path, int]]:
    """Return where the results of each image are that was predicted the same way: Id -> file and row."""
    states = {image.Id: image.state for image in images}
    found: dict[str, tuple[Path, int]] = {}
    if folder.is_dir():
        clear_leftovers(folder)
    for path in sorted(folder.glob("*.npz")):
        if path.name.startswith("."):
            continue
        arrays = read_part(path, ("key", "ids", "states"))
        if arrays.get("key", np.array([""]))[0] == key:
            for row, (Id, state) in enumerate(zip(arrays["ids"].tolist(), arrays["states"].tolist(), strict=True)):
                if states.get(Id) == state:
                    found[Id] = (path, row)
    return found
