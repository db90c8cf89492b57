"""Names, sizes and published weights of timm's encoders; tests/slow/test_timm_networks.py trains the networks."""

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch

from common.check.listing import encoder_listing
from common.errors import UserError
from common.recipes import Recipe, get_recipe
from common.train import pretrained, timm_encoders
from common.train.networks import Classifier, build_model, check_encoder, encoder_of
from common.train.optimizers import param_groups
from common.train.pretrained import find_weights, found_file
from common.train.timm_encoders import as_map, check_sides, outline, published_by_timm, sizes_of, takes
from tests.conftest import ROOT

LITE = "timm/tf_efficientnet_lite0"


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path, monkeypatch):
    """Empty caches, no package of weights, and no host that answers."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        timm_encoders, "PACKAGES", {"tf_efficientnet_lite0": ("lite0_for_tests", "models/a-0123abcd.pth")}
    )

    def no_host(url, path, sha256):
        raise pretrained.NotPublished("no such host")

    monkeypatch.setattr(pretrained, "fetch", no_host)


# --- names -------------------------------------------------------------------------------------------------


def test_recipes_take_any_name_without_loading_timm():
    code = (
        "import sys; from common.recipes import get_recipe; "
        "print(get_recipe('demo', ['encoder=timm/no_such_network.tag']).encoder, {'timm', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["timm/no_such_network.tag", "set()"]


@pytest.mark.parametrize(
    "name", ["timm/", "timm/../resnet18", "timm/a.b.c", "timm/a b", "timm/resnet18\n", "convnext_tiny"]
)
def test_what_cannot_be_a_name_is_refused_and_the_message_says_how_to_get_timms(name):
    with pytest.raises(UserError, match="recipe field encoder is .*; or timm/NAME, any network of timm"):
        Recipe(encoder=name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm/convnext_tinyy", "did you mean timm/convnext_tiny or "),
        ("timm/resnet18.a1_in1", "did you mean timm/resnet18.a1_in1k or "),
        ("timm/resnet18.nothing_like_it_at_all_1234567890", "To list similar ones"),
        ("timm/zzzzzzzzzzzzzzzzz", "To list similar ones: python 04_train.py --list-encoders zzzz"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(name, near):
    with pytest.raises(UserError, match=f"timm {timm.__version__} has no network {name[5:]}; .*{near}"):
        encoder_of(name)
    with pytest.raises(UserError, match="has no network"):
        check_encoder(Recipe(encoder=name))


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    timm_encoders.library.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="need the package timm; pip install -r requirements.txt"):
        encoder_of(LITE)


# --- networks that cannot serve, and sizes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("timm/crossvit_tiny_240", "its features are a list, not one map"),
        ("timm/volo_d1_224", "its 197 tokens are no grid"),
        ("timm/csatv2", "broadcast"),
    ],
)
def test_a_network_without_a_map_of_features_is_refused(name, why):
    with pytest.raises(UserError, match=f"encoder={name} cannot serve as an encoder for four channels .*{why}"):
        build_model(Recipe(encoder=name), 28)


def test_the_sizes_of_a_network_of_one_size_are_named():
    check_sides("timm/levit_128s", 224, [224])
    with pytest.raises(UserError) as error:
        check_encoder(Recipe(encoder="timm/levit_128s", image_size=256, crop_size=224))
    assert "cannot take images of 256 px; of the sizes tried it takes 224 px." in str(error.value)
    assert "--set size_rule=fixed image_size=224 crop_size=224 size_divisor=1" in str(error.value)
    by_source = Recipe(encoder="timm/maxvit_pico_rw_256", size_rule="by-source", crop_size=512, size_divisor=2)
    with pytest.raises(UserError, match="cannot take images of 384 px; of the sizes tried it takes 256, 512, "):
        check_encoder(by_source)  # 384 px from small sources, 512 from large ones
    fitting = get_recipe("demo", ["image_size=224", "crop_size=224", "size_divisor=1", "encoder=timm/levit_128s"])
    check_encoder(fitting)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("vit_tiny_patch16_224", "any"), ("swin_tiny_patch4_window7_224", "any"), ("maxvit_pico_rw_256", "256 px")],
)
def test_transformers_take_any_size_where_timm_can(name, sizes):
    assert sizes_of(f"timm/{name}") == sizes


def test_a_window_takes_its_multiples():
    assert [side for side in (128, 256, 384, 512) if takes("timm/maxvit_pico_rw_256", side)] == [256, 512]


def test_tokens_become_a_map_row_by_row():
    tokens = torch.arange(2 * 6 * 5).view(2, 6, 5)
    found = as_map(tokens, 2 / 3)
    assert found.shape == (2, 5, 2, 3) and all(found[1, :, k // 3, k % 3].equal(tokens[1, k]) for k in range(6))
    assert as_map(tokens[:, :1], 1.0).shape == (2, 5, 1, 1)
    with pytest.raises(ValueError, match="its 5 tokens are no grid"):
        as_map(tokens[:, :5], 1.0)


def test_parts_that_do_not_reach_the_features_are_left_out():
    assert outline("timm/convnext_atto").idle == ("head",)
    assert "conv_head" in outline("timm/mobilenetv3_small_050").idle
    assert outline("timm/vit_tiny_patch16_224").idle == outline(LITE).idle == ()


# --- layer groups ------------------------------------------------------------------------------------------


def names_of_halves(name: str) -> list[list[str]]:
    with torch.device("meta"):
        model = build_model(Recipe(encoder=name), 28)
    known = {id(parameter): name.removeprefix("encoder.network.") for name, parameter in model.named_parameters()}
    return [[known[id(parameter)] for parameter in group["params"]] for group in param_groups(model, (1.0, 2.0, 3.0))]


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("timm/resnet18", ("layer3.", "layer4.")),  # a stem and 8 blocks: 5 and 4
        ("timm/vit_tiny_patch16_224", (*(f"blocks.{k}." for k in range(6, 12)), "norm.")),  # 14 layers
        ("timm/convnext_atto", (*(f"stages.2.blocks.{k}." for k in range(2, 6)), "stages.3.")),  # 13
    ],
)
def test_three_groups_split_at_half_of_timms_layers(name, late):
    first, second, head = names_of_halves(name)
    assert all(name.startswith(late) for name in second) and not any(name.startswith(late) for name in first)
    assert first and all(name.startswith("head.") for name in head)


def test_without_timms_layers_the_order_of_the_parameters_counts():
    first, second, _ = names_of_halves("timm/caformer_s18")
    own = [name for name, _ in outline("timm/caformer_s18").encoder.network.named_parameters()]
    assert not hasattr(outline("timm/caformer_s18").encoder.network, "group_matcher")
    assert first + second == own and len(first) - len(second) in (0, 1)


# --- published weights -------------------------------------------------------------------------------------


def test_the_file_with_a_digest_comes_first_then_the_hubs_then_a_packages():
    published = published_by_timm(LITE)
    assert [(file.file, file.sha256) for file in published.files] == [
        ("tf_efficientnet_lite0-0aa007d2.pth", "0aa007d2"),
        ("tf_efficientnet_lite0.in1k.safetensors", ""),
        ("a-0123abcd.pth", "0123abcd"),
    ]
    assert published.files[1].urls == (
        "https://huggingface.co/timm/tf_efficientnet_lite0.in1k/resolve/main/model.safetensors",
    )
    assert published.files[2].urls == () and (published.mean, published.std) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("timm/convnext_tiny", ["convnext_tiny.in12k_ft_in1k.safetensors"]),  # on the hub alone
        ("timm/convnext_tiny.fb_in22k", ["convnext_tiny.fb_in22k.safetensors", "convnext_tiny_22k_224.pth"]),
        ("timm/vit_tiny_patch16_224", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"]),  # its other is JAX's
    ],
)
def test_each_host_of_timm_is_known(name, files):
    assert [file.file for file in published_by_timm(name).files] == files


def test_a_network_without_published_weights_has_none():
    assert published_by_timm("timm/efficientnet_b8") is None


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0-0aa007d2.pth", "tf_efficientnet_lite0.in1k.safetensors"])
def test_each_files_name_is_found_in_the_folder_of_weights(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(b"x")
    assert find_weights(LITE, "auto", tmp_path) == tmp_path / name
    assert ("is not the published file" in capsys.readouterr().out) == name.endswith(".pth")  # the hub states no digest


def test_the_hubs_cache_is_looked_at(tmp_path):
    folder = tmp_path / "hub" / "models--timm--convnext_tiny.in12k_ft_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "model.safetensors").touch()
    assert find_weights("timm/convnext_tiny", "auto", None) == folder / "snapshots" / "abc" / "model.safetensors"


def test_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "lite0_for_tests" / "models").mkdir(parents=True)
    (tmp_path / "lite0_for_tests" / "__init__.py").write_text("raise ImportError('it was run')")
    assert found_file(published_by_timm(LITE), None) is None
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lite0_for_tests" / "models" / "a-0123abcd.pth").touch()
    path, sha256 = found_file(published_by_timm(LITE), None)
    assert path == tmp_path / "lite0_for_tests" / "models" / "a-0123abcd.pth" and sha256 == "0123abcd"


def test_without_a_network_the_message_names_every_host_and_file(tmp_path, capsys):
    assert find_weights(LITE, "auto", tmp_path) is None
    told = capsys.readouterr().out
    for file in published_by_timm(LITE).files[:2]:
        assert f"save one of these as {tmp_path / file.file}:\n  {file.urls[0]} (no such host)" in told
    assert "Or save one of these" in told and "a-0123abcd" not in told


# --- the list ----------------------------------------------------------------------------------------------


def test_the_list_has_ours_and_timms_that_match(tmp_path):
    (tmp_path / "resnet18-f37072fd.pth").touch()
    lines = {line.split()[0]: line.split()[1:] for line in encoder_listing("resnet18", tmp_path).splitlines()[1:]}
    assert lines["resnet18"] == [
        "11176512",
        "any",
        "resnet18-f37072fd.pth",
        str(Path(tmp_path, "resnet18-f37072fd.pth")),
    ]
    assert lines["timm/resnet18"][:2] == ["11179648", "any"] and "timm/skresnet18" in lines
    assert not any(name.startswith("densenet") for name in lines)


def test_a_pattern_with_a_dot_lists_the_weights_of_a_network():
    lines = encoder_listing("resnet18.a?_in1k", None).splitlines()[1:]
    assert [line.split()[0] for line in lines] == [f"timm/resnet18.a{k}_in1k" for k in (1, 2, 3)]


def test_what_cannot_serve_is_listed_as_such_and_no_match_is_an_error():
    assert encoder_listing("crossvit_9_240", None).splitlines()[1].split()[1:] == [
        "-",
        "none:",
        "it",
        "cannot",
        "serve",
        "-",
        "-",
    ]
    with pytest.raises(UserError, match="no encoder matches 'zzz'"):
        encoder_listing("zzz", None)


def test_checkpointing_is_timms_own_or_refused():
    model = build_model(Recipe(encoder="timm/vit_tiny_patch16_224", checkpointing=True), 28)
    assert isinstance(model, Classifier) and model.encoder.network.grad_checkpointing and not model.checkpointing
    with pytest.raises(UserError, match="checkpointing=true: timm/dla34 cannot"):
        build_model(Recipe(encoder="timm/dla34", checkpointing=True), 28)
