"""Train what people would use instead of stage 04, one fold per process: fastai's one cycle, and a plain loop.

Both read stage 01's images into memory, train on stage 03's rows with their copies, and predict the validation part as
the mean of eight symmetries. ResNets see images of 96 px: larger ones leave them too few epochs. The last line printed
is a JSON object: seconds per epoch.

example python benchmarks/others.py --contestant fastai-resnet18 --work work --fold 0 --epochs 10 --rate 0.003 \\
            --out out.npz
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.process import command_line
from common.process.main import run

# contestant -> changes of the demo's recipe: its images and crops are used, and by plain-ours also its network
CONTESTANTS = {name: ["size_divisor=8"] for name in ("fastai-resnet18", "fastai-resnet34", "plain-resnet18")} | {
    "plain-ours": []
}


def parse_args():
    parser = command_line.parser(__doc__)
    parser.add_argument("--contestant", required=True, choices=CONTESTANTS)
    parser.add_argument("--fold", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=command_line.positive, required=True)
    parser.add_argument("--rate", type=float, required=True, help="top learning rate")
    parser.add_argument("--out", type=Path, required=True, help="file for the probabilities")
    return parser.parse_args()


def main():
    args = parse_args()
    import torch

    from common.artifacts.predictions import save_predictions
    from common.artifacts.tables import read_table
    from common.recipes import fit_to_source, get_recipe
    from common.train.fold_data import load_fold

    samples = read_table(args.work / "samples.csv", "01_preprocess.py")
    recipe = fit_to_source(get_recipe("demo", CONTESTANTS[args.contestant]), int(samples["side"].min()))
    data = load_fold(args.work, read_table(args.work / "folds.csv", "03_make_folds.py"), args.fold, recipe)
    torch.manual_seed(args.seed)
    train = plain if args.contestant.startswith("plain") else fastai
    model, seconds = train(args, recipe, data)
    save_predictions(args.out, data.valid.ids, predict(model, data))
    print(json.dumps({"epoch_seconds": seconds}))


def predict(model, data):
    """Return the mean probability of eight symmetries, (n, 28)."""
    import torch

    from common.train.dataset import dihedral

    images = tensors(data.valid, data.normalisation)
    model.eval()
    with torch.inference_mode():
        return torch.cat(
            [sum(model(dihedral(part, k)).sigmoid() for k in range(8)) / 8 for part in images.split(64)]
        ).numpy()


def tensors(images, normalisation):
    """Return whole images as normalised floats, (n, 4, side, side)."""
    import torch

    whole = torch.stack([torch.from_numpy(images[row][0].copy()) for row in range(len(images))])
    return normalisation(whole, torch.device("cpu")).contiguous()


def fastai(args, recipe, data):
    """Train on whole images with symmetries, one cycle, binary cross-entropy, batches of 64."""
    from dataclasses import replace

    import torch
    from fastai.vision.all import (
        BCEWithLogitsLossFlat,
        DataLoaders,
        Dihedral,
        Learner,
        TensorImage,
        create_vision_model,
        resnet18,
        resnet34,
    )

    def items(images):
        x = tensors(replace(images, crop=None), data.normalisation)
        y = torch.from_numpy(images.targets).float()
        return [(TensorImage(x[i]), y[i]) for i in range(len(x))]

    dls = DataLoaders.from_dsets(items(data.train), items(data.valid), bs=64, after_batch=[Dihedral()], num_workers=0)
    encoder = {"fastai-resnet18": resnet18, "fastai-resnet34": resnet34}[args.contestant]
    learner = Learner(
        dls, create_vision_model(encoder, 28, pretrained=False, n_in=4), loss_func=BCEWithLogitsLossFlat()
    )
    started = time.monotonic()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(args.epochs, args.rate)
    return learner.model, (time.monotonic() - started) / args.epochs


def plain(args, recipe, data):
    """Train on random crops with symmetries, AdamW, one cosine, binary cross-entropy, batches of 32.

    The network is ResNet-18, or the recipe's.
    """
    import torch
    from torch.utils.data import DataLoader
    from torchvision.models import resnet18

    from common.train.dataset import EpochBatches, collate
    from common.train.networks import build_model

    if args.contestant == "plain-ours":
        model = build_model(recipe, 28)
    else:
        model = resnet18(num_classes=28)
        model.conv1 = torch.nn.Conv2d(4, 64, 7, stride=2, padding=3, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate)
    steps = EpochBatches(len(data.train), 32, args.seed, 0).steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
    loss = torch.nn.BCEWithLogitsLoss()
    model.train()
    started = time.monotonic()
    for epoch in range(args.epochs):
        for images, targets in DataLoader(
            data.train, batch_sampler=EpochBatches(len(data.train), 32, args.seed, epoch), collate_fn=collate
        ):
            optimizer.zero_grad()
            loss(model(data.normalisation(images, torch.device("cpu"))), targets).backward()
            optimizer.step()
            schedule.step()
    return model, (time.monotonic() - started) / args.epochs


if __name__ == "__main__":
    run(main)
