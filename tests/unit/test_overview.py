import json

import numpy as np
import pytest

from common.check.listing import class_weight_table, recipe_records, recipe_table
from common.classes import CLASS_NAMES
from common.recipes import RECIPES, Recipe


def test_the_table_reads_like_the_papers():
    table = recipe_table().set_index("recipe")
    assert list(table.index) == list(RECIPES)
    assert table.loc["resnet101", "buffers (dropout)"] == "4096 (0.25), 1024 (0.5)"
    assert table.loc["inceptionv4", "pooling"] == "acp -> 3072"
    assert table.loc["gapnet_pl", "pooling"] == "own -> 224"
    assert table.loc["senet", "learning rates"] == "0.001, 0.003, 0.005"
    assert table.loc["gapnet_pl", "parameters"] == 630_076
    assert table.loc["gapnet_pl", "crop of image"] == "768 of 1024"


def test_programs_get_every_field():
    records = json.loads(json.dumps(recipe_records()))
    assert {record["recipe"] for record in records} == set(RECIPES)
    assert records[0]["batch_size"] == 74 and records[0]["parameters"] > 2e7


def test_the_class_weights_are_those_of_eq_5_and_6():
    counts = np.arange(28) + 1
    table = class_weight_table(counts, Recipe(alpha=0.9))
    assert tuple(table["class"]) == CLASS_NAMES and list(table["n"]) == list(counts)
    q = np.cumsum(0.9 ** np.arange(28))  # 1 + 0.9 + 0.81 + ...
    np.testing.assert_allclose(table["Q_n"], q, atol=0.01)
    np.testing.assert_allclose(table["1/Q_n"], 1 / q, atol=1e-4)
    assert table["weight"].sum() == pytest.approx(28, abs=0.01)
