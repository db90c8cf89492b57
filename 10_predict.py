"""Predict new images with trained networks: images in, answers out. No labels and no folds are needed.

reads   --images DIR or CSV; --model DIR: a work folder with trained runs, or a package; it is never changed, but for
        MODEL/reference/, what its networks make of training images, if it can be written
writes  OUT/predictions.csv    Id, predicted classes by name, flags, how sure, 28 probabilities; opens in a spreadsheet
        OUT/predictions.npz    the same as arrays, with the probabilities of each network; stages 06 and 07 read it
        OUT/embeddings.npz     what enters each network's last layer, per network
        OUT/predictions.html   with --html: a page of all images to sort and filter, and a map of them

Images are <Id>_red.tif, _green, _blue and _yellow (or .png, .jpg), or one OME-TIFF, ImageJ TIFF or OME-Zarr per sample.
docs/new_images.md has all about formats, magnification and missing channels.

example python 10_predict.py --images my_images --model work --out my_answers
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.process import command_line
from common.process.main import run


def parse_args():
    from common.predict.options import add_flags, check_flags

    parser = command_line.Parser(__doc__)
    add_flags(parser)
    args = parser.parse_args()
    check_flags(parser, args)
    return args


def main():
    args = parse_args()

    # Imported here: --help needs none of it, and Ctrl+C during imports ends in one message.
    from common.predict.answers import answer, plan
    from common.predict.describe import describe_images, describe_model, describe_results
    from common.predict.inputs import check, list_images
    from common.predict.model import Choice, open_model
    from common.predict.options import input_options, settings_of

    if args.cluster:
        args.images = args.images.resolve()  # workers run in another folder
    options, settings = input_options(args), settings_of(args)
    model = open_model(args.model, Choice(args.recipes, args.folds))
    print("10_predict: " + "\n  ".join(describe_model(model)), flush=True)
    images = check(list_images(args.images, options), options, args.jobs or -1)
    planned = plan(model, images, options, settings, args)
    print("10_predict: " + "\n  ".join(describe_images(planned.images, model)), flush=True)
    if planned.stage.is_current():
        planned.stage.say_current()
    else:
        results = answer(planned, args)
        print("10_predict: " + "\n  ".join(describe_results(args.out, results, model, options.levels)))
    if args.html:
        from common.predict.page import make_page

        make_page(planned, args.heat_maps or [])


if __name__ == "__main__":
    run(main)
