"""Runs with their own names: from --name or a file, kept in the work folder; sizes after '@'."""

import pytest

from common.artifacts.experiments import add_experiments, asked_recipes, read_experiments
from common.artifacts.layout import Layout
from common.errors import UserError
from common.experiments import read_recipes_file
from common.pipeline import parse_args, trained_runs
from common.recipes import RECIPES, Experiment, ablation_runs, get_recipe, get_recipes, named_recipe, run_name
from tests.conftest import ROOT

FILE = """
[alpha999]
base = "resnet50"
alpha = 0.999
hard_share = 0.5

[both]
base = "alpha999"
buffers = [64, 32]
dropouts = [0.1, 0.2]
enlarge = true
"""


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "work")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(FILE)
    return path


def test_a_named_run_is_known_from_then_on(layout):
    (recipe,) = asked_recipes(layout, ["demo"], ["alpha=0.5"], "half", None).values()
    assert recipe == get_recipe("demo", ["alpha=0.5"])
    again = asked_recipes(layout, ["half", "demo", "half-quick"], [], None, None)
    assert again["half"] == recipe and again["demo"] == RECIPES["demo"]
    assert again["half-quick"].size_divisor == 8 and again["half-quick"].alpha == 0.5


def test_a_file_holds_experiments_that_are_based_on_each_other(layout, file):
    recipes = asked_recipes(layout, ["both", "alpha999"], ["l1=0.1"], None, file)
    assert (recipes["both"].alpha, recipes["both"].hard_share, recipes["both"].l1) == (0.999, 0.5, 0.1)
    assert (recipes["both"].buffers, recipes["both"].dropouts, recipes["both"].enlarge) == ((64, 32), (0.1, 0.2), True)
    assert read_experiments(layout)["alpha999"] == Experiment("resnet50", ("alpha=0.999", "hard_share=0.5"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[a]\nalpha = 0.9", ["a has no base"]),
        ('[a]\nbas = "resnet50"', ["a has no base", "bas"]),
        ("a = 3", ["a has no base"]),
        ("", ["has no runs"]),
        ("[a", ["not valid TOML"]),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, parts):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError) as error:
        read_recipes_file(tmp_path / "x.toml")
    assert all(part in str(error.value) for part in ["x.toml", *parts])


@pytest.mark.parametrize("name", ["", "a-b", "a@b", "a,b", "../a", "a/b", ".a", "resnet50", "con fig"])
def test_names_that_mean_something_else_are_refused(layout, name):
    with pytest.raises(UserError, match="name"):
        add_experiments(layout, {name: Experiment("demo")})
    assert not layout.experiments.exists()


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (Experiment("nope"), "a: unknown recipe 'nope'"),
        (Experiment("demo", ("alhpa=1",)), "a: unknown recipe field 'alhpa'; did you mean alpha"),
        (Experiment("demo", ("alpha=x",)), "a: cannot read the setting 'alpha=x'"),
        (Experiment("b"), "a: b: unknown recipe 'a'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is_kept(layout, experiment, message):
    with pytest.raises(UserError, match=message):
        add_experiments(layout, {"a": experiment, "b": Experiment("a")})
    assert not layout.experiments.exists()


def test_a_name_with_a_training_stays_what_it_is(layout):
    add_experiments(layout, {"a": Experiment("demo", ("alpha=0.5",)), "b": Experiment("demo")})
    (layout.runs / "a").mkdir(parents=True)
    add_experiments(layout, {"a": Experiment("demo", ("alpha=0.5",)), "b": Experiment("demo", ("alpha=0.4",))})
    with pytest.raises(UserError, match="a is demo alpha=0.5 in .*, not demo alpha=0.6; give another name"):
        add_experiments(layout, {"a": Experiment("demo", ("alpha=0.6",))})
    assert {name: each.settings for name, each in read_experiments(layout).items()} == {
        "a": ("alpha=0.5",),
        "b": ("alpha=0.4",),
    }


def test_a_name_is_for_one_recipe(layout):
    with pytest.raises(UserError, match="--name x is for one --recipe, found demo, demo_large"):
        asked_recipes(layout, ["demo", "demo_large"], [], "x", None)


@pytest.mark.parametrize(
    "content", ["[]", '{"a": 1}', '{"a": {"base": "demo"}}', '{"../x": {"base": "demo", "settings": []}}']
)
def test_a_damaged_list_of_experiments_is_one_message(layout, content):
    layout.work.mkdir()
    layout.experiments.write_text(content)
    with pytest.raises(UserError, match="experiments.json|cannot be the name"):
        read_experiments(layout)


def test_a_size_is_a_variant_like_the_others():
    recipe = get_recipe("resnet50@1024")
    assert (recipe.image_size, recipe.crop_size, recipe.size) == (1024, 768, 1024)
    assert get_recipe("resnet50@768") == RECIPES["resnet50"]
    assert get_recipe("demo@512").size == 128 and get_recipe("demo@512").crop == 96
    assert run_name("resnet50@1024-quick-ta") == "resnet50@1024-quick"
    assert get_recipe("resnet50@1024-quick").size == 128
    assert ablation_runs("resnet50@1024")["hard"] == "resnet50@1024-hard"
    assert named_recipe("x@384", {"x": Experiment("demo", ("alpha=0.5",))}).alpha == 0.5
    assert {recipe.store for recipe in get_recipes(["resnet50", "resnet50@1024"]).values()} == {"768", "1024"}


@pytest.mark.parametrize("name", ["resnet50@", "resnet50@x", "resnet50@63", "resnet50@4097", "resnet50@-1"])
def test_an_impossible_size_is_refused(name):
    with pytest.raises(UserError):
        get_recipe(name)


def test_run_all_and_the_tables_know_the_names_of_the_work_folder(layout, file):
    asked_recipes(layout, ["alpha999"], [], None, file)
    args = parse_args(["--work", str(layout.work), "--tables", "--recipes", "alpha999"], ROOT)
    assert trained_runs(args) == list(ablation_runs("alpha999", read_experiments(layout)).values())
    assert "alpha999-hard" in trained_runs(args)
