"""Stage 05: which folds to predict, and a network's probabilities, averaged over test-time views."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from common.artifacts.layout import Layout
from common.artifacts.predictions import load_predictions, save_predictions
from common.artifacts.stage import Stage, read_sidecar, sidecar
from common.classes import N_CLASSES
from common.data.folds import fold_numbers
from common.errors import UserError, is_out_of_memory
from common.process import stopping
from common.process.progress import progress
from common.recipes import Recipe, asked_recipe
from common.score.ensemble import mean_predictions
from common.train.checkpoints import finished_checkpoint, load_network
from common.train.dataset import BATCH, Batch, ImageSet, Normalisation, dihedral, loader, on_device, whole_batches
from common.train.fold_data import image_set
from common.train.hardware import Fitting, Hardware, HardwareOptions, batch_bytes, choose_hardware, fit_shared_memory

View = Callable[[torch.Tensor], torch.Tensor]  # from images to the images that are predicted


# --- jobs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictionJob:
    """One fold of a recipe to predict with.

    name : of the recipe
    folds : the whole table of stage 03
    means : part -> table of samples that every fold predicts, to be averaged over the folds
    settings : tta, view and checkpoint, as in stage 05's sidecars
    """

    work: Path
    name: str
    fold: int
    folds: pd.DataFrame
    means: dict[str, pd.DataFrame]
    settings: dict[str, str]
    batch_size: int = BATCH
    hardware: HardwareOptions = HardwareOptions()

    @property
    def label(self) -> str:
        return f"{self.name} fold {self.fold}"

    @property
    def parts(self) -> dict[str, pd.DataFrame]:
        """The samples to predict, by part: the fold's own, out of fold, and those of all folds."""
        return {"oof": self.folds[self.folds["fold"] == self.fold], **self.means}

    def network(self) -> tuple[Path, Recipe]:
        """Return the checkpoint to predict with and its recipe; raises UserError, see `finished_checkpoint`."""
        return finished_checkpoint(self.work, self.name, self.fold, self.folds, self.settings["checkpoint"])

    def asked(self) -> Recipe:
        """Return the recipe of a finished training, as it was before the training got more cycles."""
        return asked_recipe(read_sidecar(Layout(self.work).network(self.name, self.fold))["parameters"])

    def stage(self, part: str, network: Path, recipe: Recipe) -> Stage:
        """Return stage 05's output for one part of the samples."""
        return Stage(
            "05_predict_oof",
            self.file(part),
            self.settings,
            {"network": network, "images": Layout(self.work).images_digest(recipe.store, self.parts[part]["Id"])},
        )

    def file(self, part: str) -> Path:
        return Layout(self.work).predictions(self.name, part, self.fold)

    def views(self, recipe: Recipe) -> list[View]:
        return views(self.settings["tta"], recipe.crop if self.settings["view"] == "crops" else None)


def predict_job(job: PredictionJob) -> None:
    """Write a fold's probabilities for each part of the samples, unless they are up to date."""
    path, recipe = job.network()
    network, fitting = None, Fitting()
    for part, rows in job.parts.items():
        stage = job.stage(part, path, recipe)
        if stage.is_current():
            stage.say_current()
            continue
        with stage.lock(wait=True), ExitStack() as making:
            if stage.is_current():  # another process made it meanwhile
                continue
            record = making.enter_context(stage.making())
            hardware = choose_hardware(job.hardware, training=False)
            hardware = fit_shared_memory(hardware, job.hardware, batch_bytes(recipe, 0, job.batch_size))
            network = network or load_network(path, recipe, hardware)
            images, label = image_set(job.work, recipe, rows), f"{job.label} {part}"
            logits = predict_logits(
                *network, images, hardware, job.views(recipe), job.batch_size, label, fitting=fitting
            )
            save_predictions(stage.artifact, rows["Id"], mean_probabilities(logits))
            record.rows, record.notes = len(rows), {"hardware": hardware.record()}
        print(f"05_predict_oof: {job.label}: {len(rows)} {part} samples x {len(logits)} views", flush=True)


def combine_folds(job: PredictionJob, part: str, numbers: list[int]) -> None:
    """Write the predictions of several folds for one part as one file: their mean, or out of fold their rows.

    job : of any fold of the recipe
    """
    layout = Layout(job.work)
    files = {path.name: path for path in (layout.predictions(job.name, part, fold) for fold in numbers)}
    stage = Stage("05_predict_oof", layout.predictions(job.name, part), {"folds": numbers}, files)
    if stage.is_current():
        return stage.say_current()
    with stage.making(wait=True) as record:  # this takes a second
        again = layout.command("05_predict_oof.py", "--recipes", job.name)
        made = [load_predictions(path, again) for path in files.values()]
        if part in job.means:
            ids, probs = mean_predictions(made, list(map(str, files.values())))
        else:  # each sample is in one fold only
            ids, probs = (np.concatenate(arrays) for arrays in zip(*made, strict=True))
        save_predictions(stage.artifact, ids, probs)
        record.rows = len(ids)
        record.notes = {"networks": [read_sidecar(path)["inputs"]["network"] for path in files.values()]}


def predicted_folds(job: PredictionJob, numbers: list[int]) -> dict[str, list[int]]:
    """Return for each part of the samples the folds whose predictions belong together.

    Those are `numbers`, and other folds whose predictions are up to date. Prints which predictions of other folds are
    left out, and why.

    job : of any fold of the recipe
    """
    job = replace(job, fold=numbers[0])
    found = {part: list(numbers) for part in job.parts}
    job.network()  # raises UserError if there is none
    recipe = job.asked()
    for fold in (fold for fold in fold_numbers(job.folds) if fold not in numbers):
        other = replace(job, fold=fold)
        made = [part for part in found if sidecar(other.file(part)).is_file()]
        for part, reason in why_not_current(other, made, recipe).items():
            if reason:
                print(f"05_predict_oof: {other.file(part)} is left out of {part}.npz: {reason}")
            else:
                found[part].append(fold)
    return {part: sorted(some) for part, some in found.items()}


def why_not_current(job: PredictionJob, parts: list[str], recipe: Recipe) -> dict[str, str | None]:
    """Return for each part why its predictions are not up to date with the network of this recipe, as it was asked for.

    None for parts that are up to date.
    """
    if not parts:
        return {}
    try:
        path, own = job.network()
    except UserError as error:
        return dict.fromkeys(parts, str(error))
    if job.asked() != recipe:
        return dict.fromkeys(parts, f"fold {job.fold} was trained with another recipe")
    return {part: job.stage(part, path, own).why_stale() for part in parts}


# --- probabilities -----------------------------------------------------------------------------------------


def views(tta: str, crop: int | None = None) -> list[View]:
    """Return functions from images to the images that are predicted and averaged.

    tta : none, or dihedral for all 8 symmetries
    crop : side in pixels of five windows (corners and centre) to use instead of the whole image
    """

    def window(images: torch.Tensor, side: int, top: float, left: float) -> torch.Tensor:
        side = min(side, *images.shape[-2:])  # new images may be smaller
        rows, columns = round(top * (images.shape[-2] - side)), round(left * (images.shape[-1] - side))
        return images[..., rows : rows + side, columns : columns + side]

    def view(images: torch.Tensor, where: tuple[int, float, float] | None, turn: int) -> torch.Tensor:
        return dihedral(window(images, *where) if where else images, turn)

    windows: list[tuple[int, float, float] | None] = [None]
    if crop:
        windows = [(crop, *place) for place in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))]
    turns = range(8) if tta == "dihedral" else range(1)
    return [partial(view, where=where, turn=turn) for where in windows for turn in turns]


def predict_logits(
    model: torch.nn.Module,
    normalise: Normalisation,
    dataset: ImageSet,
    hardware: Hardware,
    tta_views: Sequence[View],
    batch_size: int = BATCH,
    label: str | None = None,
    feed: Iterator[Batch] | None = None,
    fitting: Fitting | None = None,
) -> torch.Tensor:
    """Return the logits of every image under every view, (n_views, n, n_classes) float32 on the CPU.

    Images are decoded once for all views.
    label : of the progress bar; None for no bar
    feed : iterator whose next batches are those of `whole_batches`, on the device; None to load them
    fitting : the batch size that fits into memory, if known; updated here
    """
    fitting = fitting or Fitting()
    parts = whole_batches(dataset, batch_size)
    batches = islice(feed, len(parts)) if feed else loaded(dataset, parts, hardware)
    logits_of = outputs_of_views(model, normalise, hardware, tta_views)
    done = []
    for images, _ in progress(batches, len(parts), label or "", unit="batches", quiet=not label):
        stopping.check()
        done.append(in_parts_that_fit(logits_of, images, fitting))
    if not done:
        return torch.empty(len(tta_views), 0, N_CLASSES)
    outputs = torch.cat(done, dim=1).cpu()
    result = torch.empty_like(outputs)
    result[:, np.concatenate(parts)] = outputs
    return result


def outputs_of_views(
    model: torch.nn.Module, normalise: Normalisation, hardware: Hardware, tta_views: Sequence[View]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from images (n, 4, h, w) uint8 to what the model returns for each view, (n_views, n, ...)."""
    model.eval()

    @torch.inference_mode()  # not around the loader, which may be receiving a later training batch
    def outputs_of(images: torch.Tensor) -> torch.Tensor:
        images = normalise(images, hardware.device)
        with hardware.casting():
            outputs = torch.stack([model(view(images)).float() for view in tta_views])
        if hardware.autocast == torch.float16 and not outputs.isfinite().all():  # an overflow, which 32 bits avoid
            outputs = torch.stack([model(view(images)) for view in tta_views])
        return outputs

    return outputs_of


def loaded(dataset: ImageSet, parts: list[np.ndarray], hardware: Hardware) -> Iterator[Batch]:
    """Return an iterator over batches of whole images, by their rows, on the device."""
    return on_device(loader(dataset, hardware.workers, hardware.is_gpu, parts), hardware.device)


def in_parts_that_fit(
    logits_of: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, fitting: Fitting
) -> torch.Tensor:
    """Return the logits of a batch, (n_views, n, n_classes), in as few parts as fit into memory."""
    while True:
        size = min(len(images), fitting.size or len(images))
        try:
            return torch.cat([logits_of(part) for part in images.split(size)], dim=1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if size == 1:
            raise UserError("the GPU is out of memory with one image at once; try --device cpu")
        fitting.size = size // 2
        torch.cuda.empty_cache()


def mean_probabilities(logits: torch.Tensor) -> np.ndarray:
    """Return the mean probability over views, (n, n_classes) float32, of logits (n_views, n, n_classes)."""
    return logits.sigmoid().mean(dim=0).numpy()
