"""Starting from given weights, the networks of 32-pixel images, and the recipes of transfer."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sam_repro.config.checks import validate
from sam_repro.config.compose import compose_config
from sam_repro.errors import UserError
from sam_repro.models.build import build_model
from sam_repro.models.pretrained import start_from

SMALL = [f"++model.kwargs.{key}" for key in ("embed_dim=48", "depth=2", "num_heads=3")]


def network(*overrides, classes=5, size=64):
    cfg = compose_config(["model=vit_s16", *SMALL, *overrides])
    return build_model(cfg.model, num_classes=classes, image_size=size)


def save(model, path):
    torch.nn.init.normal_(model.get_classifier().weight)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
    return path


def test_the_same_network_is_copied(tmp_path):
    theirs = network()
    path = save(theirs, tmp_path / "model.safetensors")
    for where in (path, tmp_path):
        ours = network()
        assert start_from(ours, where) == f"started from {where}"
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_another_number_of_classes_gets_a_new_head(tmp_path):
    path = save(network(), tmp_path / "w.safetensors")
    ours = network(classes=7)
    assert start_from(ours, path).endswith("with a new head")
    assert ours.head.weight.shape == (7, 48) and not ours.head.weight.any()


def test_position_embeddings_are_interpolated(tmp_path):
    theirs = network()
    ramp = torch.arange(4.0).repeat(4).view(1, 16, 1)  # the column of each patch
    theirs.pos_embed.data = ramp.expand(-1, -1, 48).clone()
    ours = network(size=128)
    sentence = start_from(ours, save(theirs, tmp_path / "w.safetensors"))
    assert sentence.endswith("with position embeddings from 4x4 to 8x8")
    grid = ours.pos_embed.detach().view(8, 8, 48)[..., 0].numpy()
    assert np.allclose(grid, grid[:1]) and (np.diff(grid[0]) > 0).all() and grid[0].mean() == pytest.approx(1.5)


def test_other_networks_are_refused_in_a_sentence(tmp_path):
    path = save(network(), tmp_path / "w.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    for where, words in [
        (path, "another network: 12 of its tensors differ, the first is blocks.2.norm1.weight, missing in the file"),
        (tmp_path / "bad.safetensors", "cannot read"),
        ("/x", "cannot read"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            start_from(network("++model.kwargs.depth=3"), where)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet18_cifar", 11_173_962), ("resnet50_cifar", 23_520_842), ("wrn28_10", 36_479_194)]
)
def test_networks_of_32_pixels(name, parameters):
    cfg = compose_config([f"model={name}", "data=cifar10", "augment=cifar"])
    validate(cfg)
    model = build_model(cfg.model, num_classes=10, image_size=32)
    assert sum(p.numel() for p in model.parameters()) == parameters
    seen = []
    last = model.layer4 if hasattr(model, "layer4") else model.blocks
    last.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2:]))
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert seen == [(4, 4) if name.startswith("resnet") else (8, 8)]
    tiny = compose_config([f"model={name}", "model.tiny=true"]).model
    assert build_model(tiny, num_classes=3, image_size=32).get_classifier().out_features == 3


@pytest.mark.parametrize(
    ("data", "steps", "warmup"),
    [("cifar10", 10_000, 500), ("cifar100", 10_000, 500), ("flowers", 500, 100), ("pets", 500, 100)],
)
def test_the_recipe_of_appendix_b2(data, steps, warmup):
    cfg = compose_config(["experiment=transfer", "model=vit_b16", f"data={data}", "init=weights"])
    validate(cfg)
    r = cfg.recipe
    assert (r.steps, r.warmup_steps, r.base, r.schedule, r.weight_decay, r.clip) == (
        steps,
        warmup,
        "sgd",
        "linear",
        0,
        1,
    )
    assert (cfg.data.image_size, cfg.data.mean, cfg.optim.perturb) == (224, [0.5] * 3, "none")


def test_the_recipe_of_eigen_sam():
    r = compose_config(["model=resnet18_cifar", "data=cifar100"]).recipe
    assert (r.lr, r.momentum, r.weight_decay, r.batch_size, r.epochs, r.schedule) == (
        0.1,
        0.9,
        5e-4,
        256,
        200,
        "cosine",
    )
