"""The size at which images of mixed sources are stored, and the sources that are too small for it."""

from pathlib import Path

import pytest

from common.data.ingest import Plan, cure_small, preprocess_stage, refuse_bad, with_sizes
from common.data.options import IngestOptions
from common.data.samples import Sample
from common.errors import UserError
from common.recipes import Recipe, describe_fit, fit_to_source, get_recipe, get_recipes


def sized(recipes, *sides):
    """Return stage 01's plan for these recipes and sources, once it knows their sides in pixels."""
    samples = [Sample(f"s{k}", "train", "0", side=side) for k, side in enumerate(sides)]
    return with_sizes(Plan(Path(), IngestOptions(recipes), samples))


@pytest.mark.parametrize(
    ("sides", "size", "crop", "n_small"),
    [
        ([512] * 8, 512, 384, 0),
        ([2048] * 8, 768, 512, 0),
        ([767], 767, 544, 0),
        ([768], 768, 512, 0),
        ([300] + [2048] * 8, 768, 512, 1),
        ([300] + [512] * 8, 512, 384, 1),  # a single odd image is ignored
        ([2048] + [512] * 8, 512, 384, 0),
        ([300, 2048, 2048], 300, 224, 0),
        ([512] * 4 + [2048] * 4, 512, 384, 0),
        ([512] * 3 + [2048] * 8, 512, 384, 0),
        ([512] * 2 + [2048] * 6, 768, 512, 2),
    ],
)
def test_a_recipe_has_the_size_that_three_quarters_of_the_sources_have(sides, size, crop, n_small):
    for some in (sides, sides[::-1]):
        plan = sized({"resnet50": get_recipe("resnet50")}, *some)
        fitted = plan.fitted["resnet50"]
        assert (fitted.size, fitted.crop) == (size, crop) and len(plan.faulty) == n_small
    # Stage 04 sees the remaining samples, and gets the same result.
    assert fit_to_source(get_recipe("resnet50"), min(plan.sides)) == fitted


def test_a_sample_must_be_large_enough_for_every_recipe():
    recipes = get_recipes(["resnet50", "gapnet_pl", "demo"])
    plan = sized(recipes, 800, 100, 2048, 2048, 2048, 2048, 2048, 2048)
    assert plan.fitted == recipes
    assert [(sample.Id, sample.fault) for sample in plan.faulty] == [
        ("s0", "train: s0 has 800 px, fewer than the 1024 px of gapnet_pl"),
        ("s1", "train: s1 has 100 px, fewer than the 768, 1024, 192 px of resnet50, gapnet_pl, demo"),
    ]


def test_sizes_by_source_leave_out_what_is_smaller_than_the_smallest_of_them():
    recipe = get_recipe("resnet50", ["size_rule=by-source"])
    plan = sized({"a": recipe}, 300, 2048, 3072, 3072)
    assert plan.fitted["a"] == recipe and [sample.Id for sample in plan.faulty] == ["s0"]


def test_with_enlarge_nothing_is_too_small_and_no_recipe_changes():
    for settings in (["enlarge=true"], ["enlarge=true", "size_rule=by-source"]):
        recipe = get_recipe("resnet50", settings)
        plan = sized({"a": recipe}, 300, 512, 512, 2048)
        assert plan.fitted == {"a": recipe} and not plan.faulty


@pytest.mark.parametrize(
    ("names", "settings", "command"),
    [
        (["resnet50"], [], "--set image_size=300 crop_size=224 (in"),
        (["resnet50", "demo"], [], "--set image_size=300 crop_size=224 (in"),
        (["resnet50", "demo_large"], ["size_divisor=2"], "--set image_size=300 crop_size=224 size_divisor=1 (in"),
        (["resnet50"], ["size_rule=by-source"], "--set size_rule=fixed image_size=300 crop_size=224 (in"),
    ],
)
def test_what_to_give_instead_is_said_and_works(tmp_path, names, settings, command):
    plan = sized(get_recipes(names, settings), 300, *[2048] * 8)
    with pytest.raises(UserError) as error:
        refuse_bad(plan.samples, tmp_path / "bad_files.csv", cure_small(plan))
    message = str(error.value)
    assert (
        "leave them out with --keep-going; enlarge samples that are too small with --set enlarge=true, or use all at"
        in message
    )
    assert command in message and "s0 has 300 px" in message
    changed = command.removeprefix("--set ").removesuffix(" (in").split()
    given = {setting.split("=")[0] for setting in changed}
    again = get_recipes(names, [*(setting for setting in settings if setting.split("=")[0] not in given), *changed])
    plan = sized(again, 300, *[2048] * 8)
    assert plan.fitted == again and not plan.faulty


def test_the_line_of_stages_01_and_04_says_what_is_used_and_what_to_give_instead():
    recipe = get_recipe("resnet50")
    assert describe_fit("resnet50", recipe, fit_to_source(recipe, 512)) == (
        "the smallest source image has 512 px: resnet50 uses 512 px with crops of 384 instead of 768 and 512; nothing "
        "is enlarged. To enlarge instead, give stages 01 and 04 --set enlarge=true"
    )


def test_stage_01_runs_again_when_it_is_to_enlarge(tmp_path):
    plain, enlarging = (
        preprocess_stage(tmp_path, Plan(tmp_path, IngestOptions({"a": Recipe(enlarge=enlarge)}), []))
        for enlarge in (False, True)
    )
    assert enlarging.changes(plain.made_from()) == "enlarge was False, now True"
    before = {
        "parameters": {"sizes": ["128", "768"], "white_level": 65535, "keep_going": False},
        "inputs": plain.inputs,
    }
    assert plain.changes(before) is None  # as before the field existed
