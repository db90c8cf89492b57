import pytest

from common.errors import UserError
from common.recipes import RECIPES, Recipe, fit_to_source, from_dict, get_recipe, to_dict


def test_resnet50_has_the_papers_numbers():
    recipe = get_recipe("resnet50")
    assert (recipe.image_size, recipe.crop_size, recipe.batch_size) == (768, 512, 74)
    assert recipe.group_learning_rates == (1e-2, 2e-2)
    assert (recipe.momentum, recipe.weight_decay, recipe.cycle_epochs, recipe.max_cycles) == (0.9, 1e-6, 4, 4)
    assert (recipe.buffers, recipe.dropouts, recipe.hard_share, recipe.alpha) == ((1024,), (0.5,), 0.7, 0.99)


def test_learning_rates_of_groups_follow_the_paper():
    assert Recipe(learning_rate=0.03).group_learning_rates == pytest.approx((0.01, 0.03))
    assert Recipe(learning_rate=0.04, layer_groups=3).group_learning_rates == pytest.approx((0.01, 0.02, 0.04))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_being_saved(name):
    assert from_dict(to_dict(RECIPES[name])) == RECIPES[name]


def test_quick_divides_sizes_by_eight():
    quick = get_recipe("resnet50-quick")
    assert (quick.size, quick.crop, quick.encoder) == (96, 64, "resnet50")
    # 8 of 74 samples a batch: learning rates for 74 would diverge
    assert quick.group_learning_rates == pytest.approx((1e-2 * 8 / 74, 2e-2 * 8 / 74))


def test_settings_are_read_by_type():
    recipe = get_recipe("resnet50", ["alpha=0.999", "batch_size=8", "buffers=512,64", "dropouts=.1,.2", "base_loss=bce"])
    assert (recipe.alpha, recipe.batch_size, recipe.buffers, recipe.dropouts, recipe.base_loss) == (0.999, 8, (512, 64), (0.1, 0.2), "bce")


def test_a_small_source_is_used_at_its_own_size():
    fitted = fit_to_source(get_recipe("resnet50"), 512)
    assert (fitted.size, fitted.crop) == (512, 384)
    assert fit_to_source(get_recipe("resnet50"), 2048) == get_recipe("resnet50")
    assert fit_to_source(get_recipe("resnet50-quick"), 512).size == 96


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("resnet5", [], "unknown recipe 'resnet5'; did you mean resnet50"),
    ("resnet50-quik", [], "unknown variant 'quik' of recipe resnet50; did you mean quick"),
    ("resnet50", ["alhpa=0.9"], "unknown recipe field 'alhpa'; did you mean alpha"),
    ("resnet50", ["alpha=x"], "cannot read the setting 'alpha=x'; expected alpha=<float>"),
    ("resnet50", ["alpha"], "cannot read the setting 'alpha'"),
    ("resnet50", ["alpha=1"], "alpha has an impossible value: 1.0"),
    ("resnet50", ["encoder=resnet51"], "encoder is 'resnet51'; did you mean resnet50"),
    ("resnet50", ["crop_size=1024"], "crop_size has an impossible value"),
    ("resnet50", ["dropouts=0.5,0.5"], "dropouts has an impossible value"),
])
def test_mistakes_name_the_nearest_known(name, settings, message):
    with pytest.raises(UserError, match=message):
        get_recipe(name, settings)


def test_a_recipe_of_another_version_is_refused():
    with pytest.raises(UserError, match="another version of this project .differs in: alpha, beta"):
        from_dict({**{k: v for k, v in to_dict(Recipe()).items() if k != "alpha"}, "beta": 1})
