"""Export a trained model as a package to hand on: weights, what they mean, a model card, ONNX, BioImage.IO.

reads   --model: a work folder with trained runs and thresholds, or another package; it is never changed, but for
        MODEL/reference/, what its networks make of training images, if it can be written
writes  PACKAGE (a folder, or one file if it ends in .zip):
        weights/<run>-fold<k>.safetensors  tensors of every network
        reference/<run>-fold<k>.npz        how it sees images like those that it was trained on
        model.json                         classes, channels, thresholds, scores, recipes, digests of all files
        README.md                          model card: what it was trained on, how good it is, how to use it
        model.onnx                         images (n, 4, h, w) to probabilities (n, 28), checked against torch
        bioimageio.yaml, test_*.npy        for BioImage.IO, checked by its validator
        model.json.meta.json (beside a zip file: PACKAGE.meta.json)   what it was made from

The last two need packages that are optional; a line says which ones. 10_predict.py --model PACKAGE predicts with it.

example python 11_export.py --model work --out package.zip --licence CC-BY-4.0
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.process import command_line
from common.process.main import run


def parse_args():
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--model",
        type=command_line.folder,
        default=Path("work"),
        metavar="MODEL",
        help="work folder with trained runs, or a package (default: work)",
    )
    parser.add_argument(
        "--out", type=command_line.folder, required=True, metavar="PACKAGE", help="folder or .zip file to write"
    )
    parser.add_argument(
        "--licence",
        metavar="SPDX",
        help="licence of the weights, which you choose: an SPDX identifier, for example CC-BY-4.0 (default: none stated)",
    )
    parser.add_argument(
        "--author", action="append", default=[], metavar="NAME", help="who trained the model; once for each person"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the model (default: its runs)")
    parser.add_argument(
        "--recipes", type=command_line.recipe_names, metavar="A,B", help="use these runs (default: those of stage 06)"
    )
    parser.add_argument(
        "--folds", type=command_line.fold_numbers, metavar="0,2", help="use the networks of these folds (default: all)"
    )
    optional = argparse.BooleanOptionalAction
    parser.add_argument("--onnx", action=optional, help="add an ONNX graph (default: if its packages are installed)")
    parser.add_argument(
        "--bioimage", action=optional, help="add a BioImage.IO description (default: if its packages are installed)"
    )
    parser.add_argument(
        "--reference",
        action=optional,
        default=True,
        help="keep how the networks see up to 256 training images each, with their Ids and labels, so that "
        "10_predict.py can mark images unlike them (default: yes)",
    )
    return parser.parse_args()


def main():
    args = parse_args()

    # Imported here: --help needs none of it, and Ctrl+C during imports ends in one message.
    from common.predict.model import Choice, open_model

    model = open_model(args.model, Choice(args.recipes, args.folds))

    from common.export import package  # loads torch

    options, left_out = package.choose_options(model, args)
    stage = package.export_stage(model, args.out, options)
    package.refuse_other(model, args.out, stage)
    if stage.is_current():
        return stage.say_current()
    for line in [*(f"warning: {warning}" for warning in model.warnings), *left_out]:
        print(f"11_export: {line}", flush=True)
    print("11_export: " + "\n  ".join(package.make(model, args.out, options, stage)))


if __name__ == "__main__":
    run(main)
