"""Every training setting in one dataclass, and the table of recipes.

Numbers are those of Zhang et al. 2021 ("Trainings settings for different base models"); where the paper is
silent, the field's comment says what was chosen.
"""

import dataclasses
from dataclasses import dataclass, replace

from common.errors import UserError, nearest

CHOICES = {
    "encoder": ("resnet50", "resnet18", "resnet10_narrow"),
    "head_order": ("linear-relu-dropout", "dropout-linear-relu"),
    "fourth_channel": ("red", "zeros", "mean"),
    "base_loss": ("focal", "bce"),
    "class_weights": ("normalised", "raw", "none"),
    "weighted_part": ("column", "positives"),
    "class_reduction": ("sum", "mean"),
}


@dataclass(frozen=True)
class Recipe:
    """How one network is built and trained; checked when made. Sizes in pixels, lengths in epochs."""

    # Images: random crops of `crop_size` from `image_size`, both divided by `size_divisor`.
    image_size: int = 768
    crop_size: int = 512
    size_divisor: int = 1

    # Network: encoder, adaptive concat pooling, buffering layers of decreasing width, 28 outputs.
    encoder: str = "resnet50"
    buffers: tuple[int, ...] = (1024,)
    dropouts: tuple[float, ...] = (0.5,)
    head_order: str = "linear-relu-dropout"  # each block starts with BatchNorm; the other order is fastai's
    fourth_channel: str = "red"  # where the stem's weights for yellow come from, with pretrained weights

    # E-loss (eq. 5-6) on the base loss; weights normalised to sum to 28 (Cui et al. 2019) unless raw.
    base_loss: str = "focal"
    focal_gamma: float = 2.0
    alpha: float = 0.99
    class_weights: str = "normalised"
    weighted_part: str = "column"
    class_reduction: str = "sum"

    # Hard sampler: the share K/B of each batch that is learnt from, after a warm-up with all of it.
    hard_share: float = 0.7
    hard_warmup_epochs: int = 1

    # SGD with layer groups; `learning_rates` (first layers first) wins over `learning_rate` and `layer_groups`.
    batch_size: int = 64
    learning_rate: float = 0.01
    layer_groups: int = 2
    learning_rates: tuple[float, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 1e-6

    # Cosine cycles with restarts, until one improves the best validation loss by less than `min_cycle_gain`.
    cycle_epochs: int = 4
    max_cycles: int = 4
    min_cycle_gain: float = 0.01

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"recipe field {name} is {getattr(self, name)!r}; {nearest(str(getattr(self, name)), known)}")
        checks = {
            "size_divisor": self.size_divisor >= 1,
            "crop_size": 32 <= self.crop <= self.size,
            "dropouts": len(self.dropouts) == len(self.buffers) and all(0 <= p < 1 for p in self.dropouts),
            "buffers": all(width > 0 for width in self.buffers),
            "focal_gamma": self.focal_gamma >= 0,
            "alpha": 0 <= self.alpha < 1,
            "hard_share": 0 < self.hard_share <= 1,
            "hard_warmup_epochs": self.hard_warmup_epochs >= 0,
            "batch_size": self.batch_size >= 2,
            "learning_rate": self.learning_rate > 0,
            "layer_groups": self.layer_groups in (1, 2, 3),
            "learning_rates": len(self.learning_rates) <= 3 and all(rate > 0 for rate in self.learning_rates),
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": self.weight_decay >= 0,
            "cycle_epochs": self.cycle_epochs >= 1,
            "max_cycles": self.max_cycles >= 1,
            "min_cycle_gain": 0 <= self.min_cycle_gain < 1,
        }
        wrong = [name for name, fine in checks.items() if not fine]
        if wrong:
            raise UserError(f"recipe field {wrong[0]} has an impossible value: {getattr(self, wrong[0])!r}")

    @property
    def size(self) -> int:
        """Side of the stored images in pixels."""
        return self.image_size // self.size_divisor

    @property
    def crop(self) -> int:
        """Side of the training crops in pixels."""
        return self.crop_size // self.size_divisor

    @property
    def group_learning_rates(self) -> tuple[float, ...]:
        """Top learning rate of each layer group, first layers first: [lr/3, lr] or [lr/4, lr/2, lr]."""
        if self.learning_rates:
            return self.learning_rates
        divisors = {1: (1,), 2: (3, 1), 3: (4, 2, 1)}[self.layer_groups]
        return tuple(self.learning_rate / divisor for divisor in divisors)


PAPER = Recipe()
# For the demo data: the whole method at an eighth of the scale, on an encoder that learns from random weights on a
# CPU in a minute. Small classes are common there, so alpha is the smaller of the paper's two examples.
DEMO = replace(PAPER, encoder="resnet10_narrow", size_divisor=8, buffers=(256,), dropouts=(0.1,), alpha=0.9,
               batch_size=16, learning_rates=(2e-2, 2e-2), cycle_epochs=16, max_cycles=2)

RECIPES = {
    "resnet50": replace(PAPER, batch_size=74, learning_rates=(1e-2, 2e-2)),
    "demo": DEMO,
    "demo_large": replace(DEMO, image_size=1024, crop_size=768, cycle_epochs=10),
}

def quick(recipe: Recipe) -> Recipe:
    """Return a recipe of minutes on a CPU: sizes divided by 8, few epochs, small batches with learning rates to match."""
    batch_size = min(recipe.batch_size, 8)
    rates = tuple(rate * batch_size / recipe.batch_size for rate in recipe.group_learning_rates)
    return replace(recipe, size_divisor=8, batch_size=batch_size, learning_rates=rates, cycle_epochs=4, max_cycles=2)


# Suffixes that turn any recipe into a variant of it: 'resnet50-quick'.
VARIANTS = {"quick": quick}


def get_recipe(name: str, settings: list[str] = ()) -> Recipe:
    """Return the recipe called 'name' or 'name-variant', changed by settings such as 'alpha=0.999'."""
    base, *variants = name.split("-")
    if base not in RECIPES:
        raise UserError(f"unknown recipe {base!r}; {nearest(base, RECIPES)}")
    recipe = RECIPES[base]
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"unknown variant {variant!r} of recipe {base}; {nearest(variant, VARIANTS)}")
        recipe = VARIANTS[variant](recipe)
    return replace(recipe, **dict(parse_setting(setting) for setting in settings))


def parse_setting(setting: str) -> tuple[str, object]:
    """Parse 'field=value' by the field's type; tuples are separated by commas."""
    name, equals, text = setting.partition("=")
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    if name not in fields:
        raise UserError(f"unknown recipe field {name!r}; {nearest(name, fields)}")
    default = fields[name].default
    try:
        if not equals:
            raise ValueError
        if isinstance(default, tuple):
            return name, tuple(type((default or (0.1,))[0])(part) for part in text.split(",") if part)
        return name, type(default)(text)
    except ValueError:
        kind = "numbers separated by commas" if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"cannot read the setting {setting!r}; expected {name}=<{kind}>") from None


def to_dict(recipe: Recipe) -> dict:
    """Return the recipe as plain types, for sidecars and checkpoints."""
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(recipe).items()}


def from_dict(values: dict) -> Recipe:
    """Return the recipe that `to_dict` took apart; raises UserError where this version has other fields."""
    unknown = values.keys() ^ {field.name for field in dataclasses.fields(Recipe)}
    if unknown:
        raise UserError(f"the recipe was saved by another version of this project (differs in: {', '.join(sorted(unknown))})")
    return Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def fit_to_source(recipe: Recipe, side: int) -> Recipe:
    """Return the recipe with sizes that a source of `side` pixels can give without enlarging.

    A 512 px source is used at 512 with crops of 384: the source's own size, and three quarters of it rounded
    to a multiple of 32.
    """
    if recipe.size <= side:
        return recipe
    return replace(recipe, image_size=side, crop_size=min(side, max(32, side * 3 // 4 // 32 * 32)), size_divisor=1)
