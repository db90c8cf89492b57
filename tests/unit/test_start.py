import pytest
import torch

from common.errors import UserError
from common.recipes import Recipe
from common.train import pretrained
from common.train.dataset import Normalisation
from common.train.networks import build_encoder
from common.train.pretrained import Start, start_from, weights_normalisation

RESNET = Recipe(encoder="resnet18")


@pytest.fixture
def file(tmp_path):
    torch.save(build_encoder(RESNET)[0].state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_random_weights_have_the_normalisation_of_the_data():
    assert start_from(RESNET, "none", None) == Start() and Start().inputs() == {} and Start().read() is None
    for recipe, asked, reason in (
        (RESNET, "none", "as asked for"),
        (RESNET, "auto", "the published ones could not be had"),
        (Recipe(encoder="densenet50"), "auto", "none are published for densenet50"),
    ):
        told = start_from(recipe, asked, None).describe()
        assert told == f"from random weights ({reason}), images normalised as the data asks for"


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
    again = build_encoder(RESNET, begun.read())[0]
    assert all(
        torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert begun.describe() == "from best.pt, images normalised as for those"
    assert begun.inputs() == {"weights": pretrained.fingerprint(tmp_path / "best.pt")}


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
    with pytest.raises(UserError, match=r"best\.pt has a mean or std that is not four numbers, one a channel"):
        start_from(RESNET, "best.pt", tmp_path / "best.pt")
