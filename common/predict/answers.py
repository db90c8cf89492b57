"""10_predict.py from checked images to its outputs: what is up to date, what is predicted, what is kept."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.artifacts.stage import Stage, digest
from common.data.sources import BadImage
from common.predict.batches import size_for
from common.predict.inputs import BAD_FILES, InputOptions, NewImage, refuse_bad
from common.predict.model import Model
from common.predict.outputs import Results, gather, write_outputs
from common.predict.reference import with_reference
from common.predict.run import Settings, Shard, predict_images

BATCH_GPU, BATCH_CPU = 32, 8  # windows at once


@dataclass(frozen=True)
class Planned:
    """What is to be predicted: images that can be used, by which model, into which folder; `bad` ones are left out."""

    model: Model
    images: list[NewImage]
    bad: list[NewImage]
    options: InputOptions
    settings: Settings
    out: Path
    stage: Stage


def plan(
    model: Model, images: Sequence[NewImage], options: InputOptions, settings: Settings, args: argparse.Namespace
) -> Planned:
    """Return what is to be predicted; raises UserError for images that cannot be used, unless they are left out."""
    out = args.out.resolve() if args.cluster else args.out
    out.mkdir(parents=True, exist_ok=True)
    images = [image if image.fault else with_scale(image, model) for image in images]
    refuse_bad(images, out, options)
    usable, bad = ([image for image in images if bool(image.fault) == faulty] for faulty in (False, True))
    made_from = {
        "model": model.digest,
        "images": digest([[image.Id, image.state, image.order, image.pixel_size] for image in usable]),
    }
    stage = Stage("10_predict", out / "predictions.npz", settings.record(), made_from)
    return Planned(model, usable, bad, options, settings, out, stage)


def with_scale(image: NewImage, model: Model) -> NewImage:
    """Return an image; if it cannot be brought to the scale of a network, that is its fault."""
    try:
        for store in {member.recipe.store for member in model.members}:
            size_for(image, store, model.pixel_size)
    except BadImage as error:
        return replace(image, fault=f"{image.paths[0]} {error}")
    return image


def answer(planned: Planned, args: argparse.Namespace) -> Results:
    """Predict all images and write the outputs; finished batches of an earlier run are used again."""
    from common.train.hardware import plan_hardware

    images, out = planned.images, planned.out
    hardware, first = plan_hardware(args, "10_predict", len(images), training=False)
    model, note = with_reference(planned.model, out, hardware)
    if note:
        print(f"10_predict: no image is marked as unlike the training data: {note}")
    size = args.batch_size or (BATCH_GPU if first.is_gpu else BATCH_CPU)
    if not planned.bad:
        (out / BAD_FILES).unlink(missing_ok=True)
    with planned.stage.making() as record:
        shard = Shard(without_reference(model), images, planned.settings, out.resolve() / "parts", size, hardware)
        places, faults = predict_images(shard, args.cluster)
        images = [replace(image, fault=faults.get(image.Id, "")) for image in images]
        if faults:
            refuse_bad([*planned.bad, *images], out, planned.options, "; what was predicted is kept")
        usable = [image for image in images if not image.fault]
        results = gather(usable, places, model, planned.options.levels, out / "embeddings.npz")
        write_outputs(out, results, model)
        record.rows, record.also = len(usable), [out / "predictions.csv", out / "embeddings.npz"]
        record.notes = {"networks": [member.label for member in model.members], "hardware": first.record()}
    shutil.rmtree(shard.parts)
    return results


def without_reference(model: Model) -> Model:
    """Return the model without what only the last step needs, so that jobs stay small."""
    return replace(model, reference={})
