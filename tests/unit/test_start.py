from dataclasses import replace

import pytest
import torch

from common.artifacts.files import write_json
from common.artifacts.stage import fingerprint, sidecar
from common.classes import CLASS_NAMES
from common.errors import UserError
from common.recipes import Recipe
from common.train import pretrained
from common.train.dataset import Normalisation
from common.train.networks import build_encoder, build_model
from common.train.pretrained import Start, check_unseen, start_from, weights_normalisation

RESNET = Recipe(encoder="resnet18")


@pytest.fixture
def file(tmp_path):
    torch.save(build_encoder(RESNET)[0].state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_random_weights_have_the_normalisation_of_the_data():
    assert start_from(RESNET, "none", None) == Start() and Start().inputs() == {} and Start().read(RESNET) is None
    for recipe, asked, reason in (
        (RESNET, "none", "as requested"),
        (RESNET, "auto", "the published ones were not available"),
        (Recipe(encoder="densenet50"), "auto", "none are published for densenet50"),
    ):
        told = start_from(recipe, asked, None).describe()
        assert told == f"from random weights ({reason}), images normalised by the data"


@pytest.mark.parametrize(
    ("fourth", "mean", "std"), [("red", 0.485, 0.229), ("zeros", 0.485, 0.229), ("mean", 0.449, 0.226)]
)
def test_imagenet_weights_bring_theirs_and_yellow_follows_its_weights(file, fourth, mean, std):
    normalise = start_from(Recipe(encoder="resnet18", fourth_channel=fourth), "auto", file).normalisation
    assert normalise.mean == pytest.approx((0.485, 0.456, 0.406, mean))
    assert normalise.std == pytest.approx((0.229, 0.224, 0.225, std))


def test_inceptions_weights_want_halves(file):
    assert weights_normalisation(Recipe(encoder="inceptionv4"), file) == Normalisation((0.5,) * 4, (0.5,) * 4)


def test_the_datas_own_can_be_asked_for_and_is_used_where_nothing_is_known(file):
    assert start_from(Recipe(encoder="resnet18", normalisation="data"), "auto", file).normalisation is None
    assert start_from(Recipe(encoder="resnet18", standardise="sample"), "auto", file).normalisation is None
    assert weights_normalisation(Recipe(encoder="densenet50"), file) is None


def test_another_networks_file_is_refused_at_once(file):
    with pytest.raises(UserError, match="these are not weights of densenet50"):
        start_from(Recipe(encoder="densenet50"), "mine.pth", file)


def test_a_checkpoint_of_this_project_brings_its_own(tmp_path):
    encoder = build_encoder(RESNET)[0]
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    torch.save(
        {"model": {**state, "head.0.weight": torch.ones(2)}, "mean": [0.1] * 4, "std": [0.2] * 4}, tmp_path / "best.pt"
    )
    begun = start_from(RESNET, "best.pt", tmp_path / "best.pt")
    assert begun.normalisation == Normalisation((0.1,) * 4, (0.2,) * 4)
    again = build_encoder(RESNET, begun.read(RESNET))[0]
    assert all(
        torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert begun.describe() == (
        "from best.pt (encoder; head from random weights: the file's has 2 classes, expected 28), "
        "images normalised for these weights"
    )
    assert begun.inputs() == {"weights": pretrained.fingerprint(tmp_path / "best.pt")}


OWN = Recipe(encoder="resnet10_narrow", buffers=(8,))
PLAIN = Recipe(encoder="resnet18", pooling="average", buffers=(), dropouts=())


def checkpoint(recipe=OWN, **changes):
    """Return the content of a checkpoint of this project, with weights that are all different from new ones."""
    model = build_model(recipe, 28).state_dict()
    model = {name: value + 1 if value.is_floating_point() else value for name, value in model.items()}
    return {"model": model, "mean": [0.1] * 4, "std": [0.2] * 4, "classes": list(CLASS_NAMES), "recipe": {}, **changes}


def test_the_head_is_taken_from_a_checkpoint_with_the_same_layers_and_classes(tmp_path):
    saved = checkpoint()
    torch.save(saved, tmp_path / "best.pt")
    start = start_from(OWN, str(tmp_path / "best.pt"), tmp_path / "best.pt")
    assert start.describe() == "from best.pt (encoder and head), images normalised for these weights"
    model = build_model(OWN, 28, start.read(OWN)).state_dict()
    assert all(torch.equal(value, saved["model"][name]) for name, value in model.items())


@pytest.mark.parametrize(
    ("recipe", "changes", "reason"),
    [
        (replace(OWN, buffers=(9,)), {}, "the file's has other layers"),
        (replace(OWN, buffers=(8, 8), dropouts=(0.5, 0.5)), {}, "the file's has other layers"),
        (replace(OWN, pooling="average"), {}, "the file's has other layers"),
        (OWN, {"classes": [*CLASS_NAMES[1:], CLASS_NAMES[0]]}, "the file's is for other classes"),
        (OWN, {"classes": list(CLASS_NAMES[:27])}, "the file's is for other classes"),
    ],
)
def test_where_the_head_does_not_fit_it_is_random_and_the_reason_is_told(tmp_path, recipe, changes, reason):
    saved = checkpoint(**changes)
    torch.save(saved, tmp_path / "best.pt")
    start = start_from(recipe, "best.pt", tmp_path / "best.pt")
    assert f"(encoder; head from random weights: {reason})" in start.describe()
    model = build_model(recipe, 28, start.read(recipe)).state_dict()
    assert torch.equal(model["encoder.layer1.0.conv1.weight"], saved["model"]["encoder.layer1.0.conv1.weight"])
    last = list(model)[-1]
    assert not torch.equal(model[last], saved["model"].get(last, torch.zeros(1)))


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize(
    ("outputs", "recipe", "parts"),
    [
        (28, PLAIN, "encoder and head"),
        (1000, PLAIN, "encoder; head from random weights: the file's has 1000 classes, expected 28"),
        (28, RESNET, "encoder; head from random weights: the file's has other layers"),
    ],
)
def test_another_programs_last_layer_is_taken_where_ours_has_its_shape(tmp_path, prefix, outputs, recipe, parts):
    network = {
        **build_encoder(RESNET)[0].state_dict(),
        "fc.weight": torch.ones(outputs, 512),
        "fc.bias": torch.ones(outputs),
    }
    torch.save({f"{prefix}{name}": value for name, value in network.items()}, tmp_path / "mine.pth")
    start = start_from(recipe, "mine.pth", tmp_path / "mine.pth")
    assert f"from mine.pth ({parts})" in start.describe()
    if start.with_head:
        assert build_model(recipe, 28, start.read(recipe)).head[0].weight.eq(1).all()


def test_a_head_with_nan_is_not_taken(tmp_path):
    saved = checkpoint()
    saved["model"]["head.1.weight"][0, 0] = torch.nan
    torch.save(saved, tmp_path / "best.pt")
    assert "NaN or infinite" in start_from(OWN, "best.pt", tmp_path / "best.pt").describe()


@pytest.mark.parametrize("where", ["trained_on", "made_from", "sidecar"])
def test_a_network_of_another_fold_is_refused_and_one_of_other_folds_is_a_warning(tmp_path, capsys, where):
    folds, path = tmp_path / "folds.csv", tmp_path / "best.pt"
    folds.write_text("Id")
    made = {"parameters": {"fold": 1}, "inputs": {"folds.csv": fingerprint(folds)}}
    own = {"trained_on": {"fold": 1, "folds.csv": fingerprint(folds)}, "made_from": made}
    torch.save(checkpoint(**({where: own[where]} if where in own else {})), path)
    if where == "sidecar":
        write_json(sidecar(path), {**made, "outputs": {}})
    check_unseen(path, folds, [1])
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=r"of fold 1, which was trained on the validation samples of folds 0, 2, so"):
        check_unseen(path, folds, [0, 1, 2])
    folds.write_text("other")
    check_unseen(path, folds, [0, 1])
    assert capsys.readouterr().out.startswith(f"warning: {path} is a network of this project that does not belong to")


def test_whether_a_file_has_seen_samples_is_asked_of_our_networks_only(tmp_path, capsys, file):
    check_unseen(file, tmp_path / "folds.csv", [0, 1])
    assert not capsys.readouterr().out
    torch.save(checkpoint(), tmp_path / "old.pt")  # an earlier version wrote it, and it was copied without its sidecar
    (tmp_path / "folds.csv").write_text("Id")
    check_unseen(tmp_path / "old.pt", tmp_path / "folds.csv", [0])
    assert "warning: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.5, [0.2] * 4),
        (torch.ones(3), [0.2] * 4),
        ([0.5] * 3, [0.2] * 4),
        ([0.5] * 4, ["a"] * 4),
        ([0.5] * 4, [0.0] * 4),
        ([float("nan")] * 4, [0.2] * 4),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(tmp_path, mean, std):
    torch.save({"model": build_encoder(RESNET)[0].state_dict(), "mean": mean, "std": std}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt has a mean or std that is not four numbers, one per channel"):
        start_from(RESNET, "best.pt", tmp_path / "best.pt")
