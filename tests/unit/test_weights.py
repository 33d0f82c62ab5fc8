"""Weights as people have them: usual files, wrappers, and the names of models that `evaluate` takes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sam_repro.cli.evaluate import add_arguments, data_of, load
from sam_repro.config.compose import compose_config
from sam_repro.errors import UserError
from sam_repro.models.build import build_model
from sam_repro.models.pretrained import start_from


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


def arguments(path, *words: str) -> Namespace:
    parser = ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(path), *words])


def loaded(path, *words: str) -> nn.Module:
    return load(arguments(path, "--model", "test_resnet", "--num-classes", "5", *words))[1]


def lightning(w):
    return {"state_dict": {f"model.{k}": v for k, v in w.items()} | {"loss.weight": torch.ones(2)}, "epoch": 3}


WRAPPED = {
    "a.pth": lambda w: w,
    "b.pth.tar": lambda w: {"state_dict": w, "epoch": 9, "args": Namespace(lr=0.1), "arch": "resnet50"},
    "c.bin": lambda w: {f"module.{k}": v for k, v in w.items()},
    "d.pt": lambda w: {"model": {f"_orig_mod.{k}": v for k, v in w.items()}, "optimizer": {"lr": 1}},
    "e.ckpt": lightning,
    "f.pth": lambda w: {"state_dict": {f"module._orig_mod.{k}": v.half() for k, v in w.items()}},
    "g.pth": lambda w: {"state_dict": {k: 0 * v for k, v in w.items()}, "state_dict_ema": w},
    "h.pth": lambda w: {"model": {k: 0 * v for k, v in w.items()}, "model_ema": w},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_usual_files_are_unwrapped(name, model, tmp_path):
    torch.save(WRAPPED[name](model.state_dict()), tmp_path / name)
    for key, tensor in loaded(tmp_path / name).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=1e-3, atol=1e-6)
    ours = build_model(compose_config(["model=resnet50", "model.timm=test_resnet"]).model, num_classes=5, image_size=64)
    assert start_from(ours, tmp_path / name) == f"started from {tmp_path / name}"


def test_an_average_of_torch_s_is_unwrapped(model, tmp_path):
    torch.save(AveragedModel(model).state_dict(), tmp_path / "swa.pt")  # module.* and n_averaged
    assert torch.equal(loaded(tmp_path / "swa.pt").fc.weight, model.fc.weight)


def test_other_files_are_refused_in_a_sentence(model, tmp_path):
    np.savez(tmp_path / "e.npz", x=np.zeros(3))
    torch.save({"epoch": 3, "args": Namespace()}, tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save(model, tmp_path / "whole.pth")
    for name, sentence in (
        ("e.npz", "they must be .safetensors, or torch's .pt, .pth,"),
        ("none.pt", "it has no state dict of tensors, but epoch, args"),
        ("list.pt", "no state dict of tensors, but list"),
        ("whole.pth", "objects that could run code"),
    ):
        with pytest.raises(UserError, match=sentence):
            loaded(tmp_path / name)


def test_evaluate_takes_our_names_and_timm_s(tmp_path):
    theirs = timm.create_model("resnet50", num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    cfg, model = load(arguments(tmp_path / "w.safetensors", "--model", "resnet50", "--num-classes", "7"))
    assert torch.equal(model.fc.weight, theirs.fc.weight)
    assert (cfg.data.interpolation, cfg.data.mean) == ("bicubic", [0.485, 0.456, 0.406])  # as timm says
    save_file(theirs.state_dict(), tmp_path / "run.safetensors", {"sam_repro": "{}"})
    cfg, _ = load(arguments(tmp_path / "run.safetensors", "--model", "resnet50", "--num-classes", "7"))
    assert (cfg.data.interpolation, cfg.data.mean, cfg.model.rho_max) == ("area", [0.5] * 3, 0.04)  # as ours are
    small = build_model(compose_config(["model=vit_digits"]).model, num_classes=10, image_size=32)
    save_file(small.state_dict(), tmp_path / "v.safetensors")
    words = ["--model", "vit_digits", "--num-classes", "10", "--image-size", "32"]
    assert load(arguments(tmp_path / "v.safetensors", *words))[0].model.family == "vit"
    with pytest.raises(UserError, match="there is no model 'resnet5O' here or in timm; did you mean 'resnet50'"):
        load(arguments(tmp_path / "w.safetensors", "--model", "resnet5O"))


def test_a_run_that_has_not_ended_has_no_weights_to_evaluate(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has no model.safetensors: its run has not ended; name a checkpoint"):
        load(arguments(tmp_path))


def test_evaluate_refuses_views_that_lose_pixels(model, tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "v.safetensors")
    for words, sentence in (
        (["--image-size", "70"], "test_vit does not take images of 70 pixels: .* divisible by patch size"),
        (["--eval-resize", "20"], "data.eval_resize=20 is smaller than data.image_size=160"),
        (["--std", "0", "1", "1"], "data.std=.* must be 3 numbers, each greater than 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            load(arguments(tmp_path / "v.safetensors", "--model", "test_vit", *words))


@pytest.mark.parametrize(
    ("name", "view", "tests"),
    [
        ("convnextv2_nano.fcmae_ft_in22k_in1k_384", (384, 384, "squash", "bicubic"), (384, 384)),
        ("resnet50.a1_in1k", (224, 235, "center", "bicubic"), (288, 288)),
        ("tf_efficientnet_lite0", (224, 256, "center", "bicubic"), (224, 256)),
    ],
)
def test_images_are_shown_as_timm_says(name, view, tests):
    with torch.device("meta"):
        model = timm.create_model(name)
    d = data_of(model, None, test_size=False)
    assert (d.image_size, d.eval_resize, d.crop_mode, d.interpolation) == view
    d = data_of(model, None, test_size=True)
    assert (d.image_size, d.eval_resize) == tests
    assert data_of(model, 112, test_size=False).eval_resize == int(112 * view[1] / view[0])
