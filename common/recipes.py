"""Every training setting in one dataclass, and the table of recipes.

Numbers are those of Zhang et al. 2021 ("Trainings settings for different base models"). If the paper gives none, the
field's comment gives our choice.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

from common.errors import UserError, nearest

DEFAULT = ["resnet50"]  # recipes of every stage, unless others are given

# The choices of a recipe. The tables with a row for each are in common/train: ENCODERS in networks.py, LOSSES and
# RANKINGS in losses.py, OPTIMIZERS, SCHEDULES in files of those names, AUGMENTATIONS in dataset.py; this file loads no
# torch.
CHOICES = {
    "size_rule": ("fixed", "by-source"),
    "encoder": (
        "resnet50",
        "resnet101",
        "inceptionv4",
        "se_resnext50_32x4d",
        "senet154",
        "densenet50",
        "densenet121",
        "gapnet_pl",
        "gapnet_pl_plus",
        "resnet18",
        "resnet10_narrow",
        "squeezenet1_1",
    ),
    "pooling": ("acp", "average", "levels", "own"),
    "head_order": ("linear-relu-dropout", "dropout-linear-relu", "linear-selu-dropout"),
    "fourth_channel": ("red", "zeros", "mean"),
    "augmentations": ("dihedral", "channel_dropout"),
    "normalisation": ("weights", "data"),
    "standardise": ("none", "sample"),
    "optimizer": ("sgd", "adamw", "muon"),
    "base_loss": ("focal", "bce", "asymmetric", "lovasz"),
    "class_weights": ("normalised", "raw", "none"),
    "weighted_part": ("column", "positives"),
    "class_reduction": ("sum", "mean"),
    "hard_ranking": ("loss", "positives", "rarest"),
    "schedule": ("cycles", "constant", "plateau", "one-cycle"),
    "finder": ("off", "record", "use"),
}


# Encoders that pool by themselves; they take four channels and have no BatchNorm.
OWN_POOLING = ("gapnet_pl", "gapnet_pl_plus")

# Any network of timm is an encoder too: timm/NAME, or timm/NAME.TAG for one of several published weights. Whether timm
# has it is known where it is built: this file loads no timm.
TIMM_PREFIX = "timm/"
TIMM_NAME = re.compile(r"timm/\w+(?:\.\w+)?", re.ASCII)

T = TypeVar("T")


def row_of(table: Mapping[str, T], field: str, name: str) -> T:
    """Return the row of a table of choices that a recipe's field names; raises UserError if there is none."""
    if name not in table:
        raise UserError(f"recipe field {field} is {name!r}, which has no row in its table; {nearest(name, table)}")
    return table[name]


BY_SOURCE = "by-source"
# These, and the recipe's fields, identify a training; continued : see `continued`, only in trainings that were.
OF_RUN = ("fold", "seed", "checkpoint_format", "continued")
BOOLEANS = {word: word in ("true", "yes", "1") for word in ("true", "yes", "1", "false", "no", "0")}
OFF: tuple[object, ...] = (False, 0, "", "none", "off", None, [])  # values of fields that change nothing


@dataclass(frozen=True)
class Recipe:
    """How one network is built and trained; checked on creation. Sizes in pixels, lengths in epochs.

    The default of a new field must be the behaviour before the field existed: `current_fields` relies on that.
    """

    # Images: random crops of `crop_size` from `image_size`, both divided by `size_divisor`.
    # By source: 768 from sources up to 2048 pixels, 1024 from larger ones, whatever `image_size` is.
    # Smaller sources are refused or left out, or enlarged if `enlarge`; see `ingest.fit_recipes`.
    size_rule: str = "fixed"
    image_size: int = 768
    crop_size: int = 512
    size_divisor: int = 1
    enlarge: bool = False

    # Network: encoder, pooling (adaptive concat; global average; adaptive concat of its last three levels; the encoder's
    # own), buffering layers, 28 outputs.
    encoder: str = "resnet50"
    pooling: str = "acp"
    buffers: tuple[int, ...] = (1024,)
    dropouts: tuple[float, ...] = (0.5,)
    head_order: str = "linear-relu-dropout"  # after a BatchNorm, as in fastai's other order; none with SELU
    fourth_channel: str = "red"  # source of the stem's weights for yellow
    normalisation: str = "weights"  # of the pretrained weights, or of the data; always the data's without weights
    augmentations: tuple[str, ...] = ("dihedral",)  # of training crops, in this order
    standardise: str = "none"  # "sample": each channel of each image by its own mean and deviation instead

    # An epoch has every sample once; with a power p above 0, in proportion to (count of its rarest class) ** -p.
    class_balance: float = 0.0

    # E-loss (eq. 5-6) on the base loss; weights normalised to sum to 28 (Cui et al. 2019) unless raw.
    base_loss: str = "focal"
    focal_gamma: float = 2.0
    alpha: float = 0.99
    class_weights: str = "normalised"
    weighted_part: str = "column"
    class_reduction: str = "sum"
    label_smoothing: float = 0.0  # the share of each label, present or absent, that counts as its opposite

    # Hard sampler: the share K/B of each batch that is trained on, after a warm-up with all of it. It ranks samples by
    # their loss, by its mean over their positive classes, or by that of their rarest positive class.
    hard_share: float = 0.7
    hard_warmup_epochs: int = 1
    hard_ranking: str = "loss"

    # Layer groups; `learning_rates` (first layers first) overrides `learning_rate` and `layer_groups`. A rate of 0 keeps
    # the weights of a group before the last as they are; BatchNorm's statistics follow the images all the same.
    # The finder's curve is recorded before training; with "use" its suggestion is the last group's learning rate.
    batch_size: int = 64
    learning_rate: float = 0.01
    layer_groups: int = 2
    learning_rates: tuple[float, ...] = ()
    finder: str = "record"
    optimizer: str = "sgd"  # "muon" for the weights of convolutions, with AdamW for the rest
    momentum: float = 0.9  # of SGD and Muon; beta1 of AdamW
    weight_decay: float = 1e-6  # L2 on all parameters with SGD; decoupled and on weights only with AdamW and Muon
    l1: float = 0.0
    clip_norm: float = 0.0  # limit of the gradient's norm; 0 = none
    ema: float = 0.0  # decay per step of the averaged weights that are validated and kept; 0 = the weights themselves
    checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third more time
    sync_batchnorm: bool = False  # several GPUs: normalise over the images of all, not of each

    # Cosine cycles with restarts; a constant rate; one that halves after more than `patience` validations without a
    # better loss; or one cycle over all epochs: up for a `warmup_share` of it, down to 0. Training ends after
    # cycle_epochs x max_cycles epochs; or with the first cycle that improves the validation loss by less than
    # `min_cycle_gain` (cycles, constant); or on the plateau after `max_halvings` halvings (0: no limit).
    schedule: str = "cycles"
    warmup_share: float = 0.25
    patience: int = 3
    max_halvings: int = 0
    cycle_epochs: int = 4
    max_cycles: int = 4
    min_cycle_gain: float = 0.01

    evaluate_epochs: int = 1  # validate every so many epochs, and at the end of each cycle

    def __post_init__(self) -> None:
        """Raise UserError for invalid values, and for values that do not fit together."""
        self._check_choices()
        if self.size_divisor < 1:  # sizes are divided by it
            raise UserError(f"recipe field size_divisor has an impossible value: {self.size_divisor!r}")
        self._check_numbers()
        if (self.pooling == "own") != (self.encoder in OWN_POOLING):
            raise UserError(
                f"recipe fields do not fit: pooling {self.pooling!r} with encoder {self.encoder!r}; "
                f"{' and '.join(OWN_POOLING)} need pooling=own, the other encoders another pooling"
            )
        if self.size_rule == BY_SOURCE and self.crop > stored_size(self.store, 0):
            raise UserError(
                f"recipe fields do not fit: crops of {self.crop} px from images that are stored at "
                f"{stored_size(self.store, 0)} px with size_rule={BY_SOURCE}; give a smaller crop_size"
            )

    def _check_choices(self) -> None:
        for name, known in CHOICES.items():
            value, kind = getattr(self, name), type(getattr(Recipe, name))
            for choice in value if kind is tuple and isinstance(value, tuple) else (value,):
                if isinstance(value, kind) and (choice in known or name == "encoder" and TIMM_NAME.fullmatch(choice)):
                    continue
                more = "; or timm/NAME, any network of timm: see --list-encoders of 04_train.py"
                raise UserError(
                    f"recipe field {name} is {choice!r}; {nearest(str(choice), known, every=True)}"
                    f"{more if name == 'encoder' else ''}"
                )

    def _check_numbers(self) -> None:
        checks = {
            "crop_size": 32 <= self.crop <= self.size,
            "dropouts": len(self.dropouts) == len(self.buffers) and all(0 <= p < 1 for p in self.dropouts),
            "buffers": all(width > 0 for width in self.buffers),
            "class_balance": 0 <= self.class_balance <= 1,
            "focal_gamma": self.focal_gamma >= 0,
            "label_smoothing": 0 <= self.label_smoothing < 0.5,
            "alpha": 0 <= self.alpha < 1,
            "hard_share": 0 < self.hard_share <= 1,
            "hard_warmup_epochs": self.hard_warmup_epochs >= 0,
            "batch_size": self.batch_size >= 2,
            "learning_rate": self.learning_rate > 0,
            "layer_groups": self.layer_groups in (1, 2, 3),
            "learning_rates": len(self.learning_rates) <= 3
            and all(rate >= 0 for rate in self.learning_rates)
            and self.learning_rates[-1:] != (0,),
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": self.weight_decay >= 0,
            "l1": self.l1 >= 0,
            "clip_norm": self.clip_norm >= 0,
            "ema": 0 <= self.ema < 1,
            "warmup_share": 0 <= self.warmup_share < 1,
            "patience": self.patience >= 0,
            "max_halvings": self.max_halvings >= 0,
            "cycle_epochs": self.cycle_epochs >= 1,
            "max_cycles": self.max_cycles >= 1,
            "min_cycle_gain": 0 <= self.min_cycle_gain < 1,
            "evaluate_epochs": self.evaluate_epochs >= 1,
        }
        checks |= {
            name: False
            for name, value in vars(self).items()
            for number in (value if isinstance(value, tuple) else (value,))
            if isinstance(number, float) and not math.isfinite(number)
        }
        wrong = [name for name, fine in checks.items() if not fine]
        if wrong:
            raise UserError(f"recipe field {wrong[0]} has an impossible value: {getattr(self, wrong[0])!r}")

    @property
    def size(self) -> int:
        """Side of the stored images in pixels."""
        return self.image_size // self.size_divisor

    @property
    def standardised(self) -> bool:
        """Whether images are standardised when they are read; see `dataset.standardise`."""
        return self.standardise == "sample"

    @property
    def store(self) -> str:
        """Name of the folder of stored images; see `stored_size`."""
        return str(self.size) if self.size_rule == "fixed" else f"{BY_SOURCE}-{self.size_divisor}"

    @property
    def crop(self) -> int:
        """Side of the training crops in pixels."""
        return self.crop_size // self.size_divisor

    @property
    def epochs(self) -> int:
        """The maximum number of epochs."""
        return self.cycle_epochs * self.max_cycles

    @property
    def group_learning_rates(self) -> tuple[float, ...]:
        """Top learning rate of each layer group, first layers first: [lr/3, lr] or [lr/4, lr/2, lr]."""
        if self.learning_rates:
            return self.learning_rates
        divisors = {1: (1,), 2: (3, 1), 3: (4, 2, 1)}[self.layer_groups]
        return tuple(self.learning_rate / divisor for divisor in divisors)


def stored_size(store: str, side: int) -> int:
    """Return the side in pixels at which a folder of stored images has a source of `side` pixels."""
    if not store.startswith(BY_SOURCE):
        return int(store)
    return (768 if side <= 2048 else 1024) // int(store.rsplit("-", 1)[1])


def store_settings(store: str) -> list[str]:
    """Return the settings that make any recipe use a folder of stored images."""
    if store.startswith(BY_SOURCE):
        divisor = int(store.rsplit("-", 1)[1])
        return [f"size_rule={BY_SOURCE}", f"size_divisor={divisor}", f"crop_size={32 * divisor}"]
    return ["size_rule=fixed", "size_divisor=1", f"image_size={store}", f"crop_size={store}"]


PAPER = Recipe()
# The paper gives half of the learning rates. For "default" and "as large as fits" PAPER's numbers are used.
RESNET50 = replace(PAPER, batch_size=74, learning_rates=(1e-2, 2e-2))
SENET = replace(PAPER, encoder="se_resnext50_32x4d", batch_size=80, learning_rates=(1e-3, 3e-3, 5e-3), max_cycles=8)
DENSENET50 = replace(PAPER, encoder="densenet50", learning_rates=(2e-3, 4e-3), max_cycles=5)
# The baseline with its own head, regularisation and schedule (Rumetshofer et al. 2019), trained with the E-loss.
GAPNET_PL = replace(
    PAPER,
    image_size=1024,
    crop_size=768,
    encoder="gapnet_pl",
    pooling="own",
    buffers=(256, 256),
    dropouts=(0.3, 0.3),
    head_order="linear-selu-dropout",
    hard_share=1.0,
    batch_size=128,
    layer_groups=1,
    finder="off",
    weight_decay=1e-5,
    l1=1e-7,
    clip_norm=5.0,
    schedule="plateau",
    max_halvings=4,
    max_cycles=10,
)
# For the demo data: the whole method at a quarter of the scale, with an encoder that trains from random weights on a
# CPU in a minute. Small classes are common there, so alpha is the smaller of the paper's two examples. A validation
# costs a third of an epoch.
DEMO = replace(
    PAPER,
    encoder="resnet10_narrow",
    size_divisor=4,
    buffers=(256,),
    dropouts=(0.1,),
    alpha=0.9,
    batch_size=16,
    learning_rates=(2e-2, 2e-2),
    cycle_epochs=12,
    max_cycles=2,
    evaluate_epochs=3,
)


def plus(recipe: Recipe, rates: tuple[float, ...], epochs: int) -> Recipe:
    """Return our own training of a recipe's network, which scores higher in the same time (see docs/learning.md).

    rates : top learning rates of the layer groups
    """
    return replace(
        recipe,
        standardise="sample",
        class_balance=0.5,
        optimizer="muon",
        weight_decay=0.3,
        learning_rates=rates,
        finder="off",
        schedule="one-cycle",
        cycle_epochs=epochs,
        max_cycles=1,
        base_loss="bce",
        class_weights="none",
        class_reduction="mean",
        hard_share=1.0,
        evaluate_epochs=max(1, epochs // 10),
    )


RECIPES = {
    "resnet50": RESNET50,
    "resnet101": replace(RESNET50, encoder="resnet101", buffers=(4096, 1024), dropouts=(0.25, 0.5), batch_size=64),
    "inceptionv4": replace(PAPER, encoder="inceptionv4", batch_size=48),
    "senet": SENET,
    "senet154": replace(SENET, encoder="senet154"),
    "densenet50": DENSENET50,
    "densenet121": replace(DENSENET50, encoder="densenet121"),
    "gapnet_pl": GAPNET_PL,
    "gapnet_pl_plus": replace(GAPNET_PL, encoder="gapnet_pl_plus"),
    "resnet50_plus": plus(replace(RESNET50, batch_size=64), (1e-3, 3e-3), 24),
    "senet_plus": plus(replace(SENET, batch_size=64), (1e-3, 2e-3, 3e-3), 24),
    "small_plus": replace(plus(replace(DEMO, batch_size=32), (2e-2, 1e-2), 80), dropouts=(0.5,), label_smoothing=0.02),
    "demo": DEMO,
    "demo_large": replace(DEMO, image_size=1024, crop_size=768, cycle_epochs=8),
    "demo_gapnet": replace(GAPNET_PL, size_divisor=8, batch_size=16, cycle_epochs=16, max_cycles=2),
}


# --- variants: functions that turn any recipe into another one ----------------------------------------------


def quick(recipe: Recipe) -> Recipe:
    """Return a recipe of minutes on a CPU: sizes divided by 8, few epochs, small batches with rates to match."""
    batch_size = min(recipe.batch_size, 8)
    rates = tuple(rate * batch_size / recipe.batch_size for rate in recipe.group_learning_rates)
    return replace(
        recipe, size_divisor=8, batch_size=batch_size, learning_rates=rates, finder="off", cycle_epochs=4, max_cycles=2
    )


def eloss(recipe: Recipe) -> Recipe:
    """Return the recipe without training-time optimisation: one layer group at the constant default rate."""
    if recipe.pooling == "own":
        raise UserError(f"{recipe.encoder} has its own pooling, head and schedule, so it has no variants of them")
    return replace(
        recipe, learning_rate=PAPER.learning_rate, learning_rates=(), layer_groups=1, finder="off", schedule="constant"
    )


def hard(recipe: Recipe) -> Recipe:
    """Return `eloss` without class weights."""
    return replace(eloss(recipe), class_weights="none")


def customised(recipe: Recipe) -> Recipe:
    """Return `hard` without the hard sampler."""
    return replace(hard(recipe), hard_share=1.0)


def original(recipe: Recipe) -> Recipe:
    """Return `customised` with the backbone's own global average pooling and one linear layer."""
    return replace(customised(recipe), pooling="average", buffers=(), dropouts=())


# Suffixes that turn any recipe into a variant of it: 'resnet50-quick'. Those of the ablation each add one part of
# the method, in this order; the last is the recipe itself.
ABLATION = {"original": original, "customised": customised, "hard": hard, "eloss": eloss, "ta": lambda recipe: recipe}
VARIANTS = {**ABLATION, "quick": quick}


@dataclass(frozen=True)
class Experiment:
    """A run with its own name: a recipe, or another experiment, and the settings that it changes."""

    base: str
    settings: tuple[str, ...] = ()


def run_name(name: str) -> str:
    """Return the canonical name of a recipe and its variants: 'resnet50-ta' is 'resnet50', and 'quick' comes last."""
    base, *variants = name.split("-")
    return "-".join([base, *sorted((v for v in variants if v != "ta"), key=lambda variant: variant == "quick")])


def ablation_runs(name: str, experiments: Mapping[str, Experiment] = MappingProxyType({})) -> dict[str, str]:
    """Return the run for each column of the ablation, for 'recipe' or 'recipe-quick'.

    A network with its own head and schedule has only the column eloss, with its own run.
    """
    base, *variants = name.split("-")
    if named_recipe(name, experiments).pooling == "own":
        return {"eloss": run_name(name)}
    return {column: run_name("-".join([base, column, *variants])) for column in ABLATION}


def get_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    """Return the recipe called 'name' (see `named_recipe`), changed by settings: 'alpha=0.999'; see `get_recipes`."""
    return get_recipes([name], settings)[name]


def get_recipes(
    names: list[str],
    settings: Sequence[str] = (),
    tell: Callable[[str], object] = print,
    experiments: Mapping[str, Experiment] = MappingProxyType({}),
) -> dict[str, Recipe]:
    """Return the recipes of these names, each changed by all settings.

    experiments : runs with their own names, which may be among `names`
    tell : function that gets a note on each setting that has no effect on some of the recipes
    Raises UserError for unknown names and fields, a field set twice, and a setting without effect on any recipe.
    """
    changes = [parse_setting(setting) for setting in settings]
    for field, _ in changes:
        if [name for name, _ in changes].count(field) > 1:
            raise UserError(f"recipe field {field} is set twice; give it once")
    recipes = {name: replace(named_recipe(name, experiments), **dict(changes)) for name in names}
    for field, _ in changes:
        idle = {name: idle_fields(recipe)[field] for name, recipe in recipes.items() if field in idle_fields(recipe)}
        if idle and len(idle) == len(recipes):
            name, (because, instead) = next(iter(idle.items()))
            raise UserError(
                f"recipe field {field} has no effect on {name}, which has {because}; leave it out, or set {instead}"
            )
        if idle:
            named = ", ".join(f"{name} ({because})" for name, (because, _) in idle.items())
            tell(f"note: {field} has no effect on {named}")
    return recipes


def idle_fields(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Return the fields without effect in a recipe, each with the setting that causes this and what to set instead."""
    rates = ",".join(f"{rate:g}" for rate in recipe.learning_rates)
    schedule = f"schedule={recipe.schedule}"
    rules = [
        (
            recipe.learning_rates,
            ("learning_rate", "layer_groups"),
            f"learning_rates={rates}",
            "learning_rates: one rate for each layer group, first layers first",
        ),
        (recipe.size_rule == BY_SOURCE, ("image_size",), f"size_rule={BY_SOURCE}", "size_rule=fixed too"),
        (
            recipe.encoder in OWN_POOLING,
            ("fourth_channel", "sync_batchnorm"),
            f"encoder={recipe.encoder}, made for four channels and without BatchNorm",
            "another encoder",
        ),
        (recipe.standardised, ("normalisation",), f"standardise={recipe.standardise}", "standardise=none too"),
        (
            recipe.class_weights == "none",
            ("alpha", "weighted_part"),
            "class_weights=none",
            "class_weights=normalised too",
        ),
        (
            recipe.base_loss not in ("focal", "lovasz"),
            ("focal_gamma",),
            f"base_loss={recipe.base_loss}",
            "base_loss=focal too",
        ),
        (recipe.hard_share == 1, ("hard_warmup_epochs", "hard_ranking"), "hard_share=1", "hard_share below 1 too"),
        (recipe.schedule != "plateau", ("patience", "max_halvings"), schedule, "schedule=plateau too"),
        (recipe.schedule != "one-cycle", ("warmup_share",), schedule, "schedule=one-cycle too"),
        (recipe.max_cycles == 1, ("min_cycle_gain",), "max_cycles=1", "max_cycles above 1 too"),
        (recipe.schedule in ("plateau", "one-cycle"), ("min_cycle_gain",), schedule, "schedule=cycles or constant too"),
    ]
    return {field: (because, instead) for applies, fields, because, instead in rules if applies for field in fields}


def check_experiment_name(name: str) -> None:
    """Refuse names that mean something else: recipes, variants after '-', sizes after '@', lists."""
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+]*", name):
        raise UserError(f"{name!r} cannot be the name of a run; expected letters, digits, '_', '.' and '+'")
    if name in RECIPES:
        raise UserError(f"{name} is a recipe; give the run another name")


def named_recipe(name: str, experiments: Mapping[str, Experiment] = MappingProxyType({})) -> Recipe:
    """Return the recipe called 'name', 'name@size', 'name-variant' or 'name@size-variant'."""
    whole, *variants = run_name(name).split("-")
    base, at, size = whole.partition("@")
    if base not in RECIPES and base not in experiments:
        raise UserError(f"unknown recipe {base!r}; {nearest(base, [*RECIPES, *experiments], every=True)}")
    if len(set(variants) & set(ABLATION)) > 1:
        raise UserError(f"{name}: each variant of the ablation includes the ones before it, so name only one")
    recipe = RECIPES[base] if base in RECIPES else experiment_recipe(base, experiments)
    if at:
        recipe = sized(recipe, size)
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"unknown variant {variant!r} of recipe {base}; {nearest(variant, VARIANTS, every=True)}")
        recipe = VARIANTS[variant](recipe)
    return recipe


def experiment_recipe(name: str, experiments: Mapping[str, Experiment]) -> Recipe:
    """Return the recipe of an experiment; raises UserError if experiments are based on each other in a circle."""
    others = {other: experiment for other, experiment in experiments.items() if other != name}
    experiment = experiments[name]
    try:
        return get_recipes([experiment.base], experiment.settings, lambda note: None, others)[experiment.base]
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def sized(recipe: Recipe, size: str) -> Recipe:
    """Return a recipe for images of `size` pixels, with crops of three quarters of that in multiples of 32."""
    if not size.isdecimal() or not 64 <= int(size) <= 4096:
        raise UserError(f"expected a size from 64 to 4096 pixels after '@', found {size!r}")
    if recipe.size_rule == "fixed" and recipe.image_size == int(size):
        return recipe  # with its own crop
    return replace(recipe, size_rule="fixed", image_size=int(size), crop_size=max(32, int(size) * 3 // 4 // 32 * 32))


# Other names for fields, and for flags that are no field of a recipe.
WORDS = {
    "learning_rates, or learning_rate for a recipe without them": "lr lrs rate rates",
    "cycle_epochs or max_cycles, whose product is the number of epochs": "epoch epochs n_epochs num_epochs max_epochs",
    "encoder": "backbone model arch architecture network net",
    "batch_size": "bs batch batchsize",
    "weight_decay": "wd decay l2",
    "base_loss": "loss loss_fn criterion",
    "focal_gamma": "gamma",
    "label_smoothing": "smoothing smooth label_smooth",
    "image_size": "size img_size imsize resolution",
    "crop_size": "crop patch patch_size",
    "dropouts": "dropout drop drop_rate",
    "buffers": "head hidden fc",
    "optimizer": "opt optim",
    "augmentations": "augmentation augment aug transform transforms",
    "schedule": "scheduler sched lr_schedule",
    "warmup_share": "warmup warmup_epochs",
    "clip_norm": "clip grad_clip gradient_clip max_norm",
    "hard_share": "ohem hard topk top_k",
    **{
        f"the flag --{word.replace('_', '-')} of 04_train.py": word
        for word in (
            "seed",
            "folds",
            "pretrained",
            "weights_dir",
            "device",
            "precision",
            "workers",
            "micro_batch",
            "compile",
        )
    },
}


def parse_setting(setting: str) -> tuple[str, Any]:
    """Parse 'field=value' by the field's type; tuples are separated by commas."""
    name, equals, text = setting.partition("=")
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    if name not in fields:
        word = name.lower().replace("-", "_")
        meant = next((field for field, words in WORDS.items() if word in words.split()), None)
        guess = f"did you mean {meant}?" if meant else nearest(name, fields)
        raise UserError(f"unknown recipe field {name!r}; {guess}")
    default: Any = fields[name].default
    try:
        if not equals:
            raise ValueError
        if isinstance(default, bool):
            return name, BOOLEANS[text.lower()]
        if isinstance(default, tuple):
            return name, tuple(type((default or (0.1,))[0])(part) for part in text.split(",") if part)
        return name, type(default)(text)
    except (ValueError, KeyError):
        parts = "names" if name in CHOICES else "numbers"
        kind = {tuple: f"{parts} separated by commas", bool: "true or false"}.get(type(default), type(default).__name__)
        raise UserError(f"cannot read the setting {setting!r}; expected {name}=<{kind}>") from None


def to_dict(recipe: Recipe) -> dict:
    """Return the recipe as plain types, for sidecars and checkpoints."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(recipe).items()
    }


def from_dict(values: dict) -> Recipe:
    """Return the recipe from `to_dict`'s result, of this or another version; see `current_fields`.

    Raises UserError for an unknown field that is not off.
    """
    fields = current_fields(values)
    unknown = sorted(fields.keys() - to_dict(Recipe()).keys())
    if unknown:
        found = ", ".join(f"{name}={fields[name]}" for name in unknown)
        raise UserError(
            f"the recipe was saved by another version of this project, with fields that this one does not have: {found}"
        )
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        return Recipe(**given)
    except TypeError as error:
        raise UserError(f"the saved recipe has a value of the wrong type ({error})") from None


def current_fields(saved: dict) -> dict:
    """Convert saved fields of a recipe, or the result of `run_parameters`, to those of this version.

    Missing fields get their defaults, which are the behaviour of versions without them. Unknown fields that are off (0,
    false, empty, none) are left out, since they changed nothing.
    """
    defaults = to_dict(Recipe())
    known = {*defaults, *OF_RUN}
    return {**defaults, **{name: value for name, value in saved.items() if name in known or value not in OFF}}


def run_parameters(recipe: Recipe, fold: int, seed: int, checkpoint_format: int, continued: dict | None = None) -> dict:
    """Return the parameters in stage 04's sidecar: with other values it is another training.

    continued : of a training that got more cycles after its end: `asked`, the recipe's own max_cycles, and `after`, the
        epochs at which it had ended; max_cycles is then the new maximum
    """
    of_run = {"fold": fold, "seed": seed, "checkpoint_format": checkpoint_format}
    return {**to_dict(recipe), **of_run, **({"continued": continued} if continued else {})}


def recipe_of_run(parameters: dict) -> Recipe:
    """Return the recipe in the result of `run_parameters`."""
    return from_dict({name: value for name, value in parameters.items() if name not in OF_RUN})


def asked_recipe(parameters: dict) -> Recipe:
    """Return the recipe in the result of `run_parameters` as it was before the training got more cycles."""
    recipe, continued = recipe_of_run(parameters), continued_of(parameters)
    return replace(recipe, max_cycles=continued["asked"]) if continued else recipe


def continued_of(parameters: dict) -> dict | None:
    """Return `continued` in the result of `run_parameters`; None if the training never got more cycles."""
    found = parameters.get("continued")
    if not isinstance(found, dict) or not isinstance(found.get("asked"), int):
        return None
    after = found.get("after")
    fine = isinstance(after, list) and bool(after) and all(isinstance(epoch, int) for epoch in after)
    return found if fine and found["asked"] > 0 else None


def is_too_small(recipe: Recipe, side: int) -> bool:
    """Tell whether a source of `side` pixels is smaller than the recipe's stored images, and may not be enlarged."""
    return not recipe.enlarge and stored_size(recipe.store, side) > side


def fit_to_source(recipe: Recipe, side: int) -> Recipe:
    """Return the recipe with sizes that a source of `side` pixels can give without enlarging.

    A 512 px source is used at 512 with crops of 384: the source's own size, and three quarters of it, rounded down to a
    multiple of 32. A recipe that enlarges is not changed.
    """
    if not is_too_small(recipe, side):
        return recipe
    return replace(
        recipe,
        size_rule="fixed",
        image_size=side,
        crop_size=min(side, max(32, side * 3 // 4 // 32 * 32)),
        size_divisor=1,
    )


def describe_fit(name: str, recipe: Recipe, fitted: Recipe) -> str:
    """Describe what `fit_to_source` changed in a recipe, and how to enlarge instead."""
    return (
        f"the smallest source image has {fitted.size} px: {name} uses {fitted.size} px with crops of {fitted.crop} "
        f"instead of {recipe.size} and {recipe.crop}; nothing is enlarged. To enlarge instead, give stages 01 and 04 "
        "--set enlarge=true"
    )


def describe_fits(recipes: Mapping[str, Recipe], fitted: Mapping[str, Recipe]) -> list[str]:
    """Return a line for each recipe that `fit_to_source` changed."""
    return [describe_fit(name, recipe, fitted[name]) for name, recipe in recipes.items() if fitted[name] != recipe]
