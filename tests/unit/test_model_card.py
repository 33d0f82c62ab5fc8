"""The model card: its loading lines work as printed, for every model; and its digest is checked."""

from __future__ import annotations

import os

import pytest
import torch

from sam_repro.config.compose import choices, compose_config, to_dict
from sam_repro.errors import UserError
from sam_repro.models.build import build_model
from sam_repro.models.pretrained import read_weights
from sam_repro.training import checkpoint
from sam_repro.training.model_card import loading_lines, model_card


@pytest.mark.parametrize("name", choices("model"))
def test_the_loading_lines_work_as_printed(name, tmp_path, monkeypatch):
    """Away from the default size and number of classes; models that timm does not have, and Mixers, among them."""
    monkeypatch.chdir(tmp_path)
    cfg = compose_config([f"model={name}", "optim=sam", "debug=tiny", "data.num_classes=7"])
    shape = {"num_classes": 7, "image_size": cfg.data.image_size}
    ours = build_model(cfg.model, **shape).eval()
    torch.nn.init.normal_(ours.get_classifier().weight)  # pyright: ignore[reportCallIssue]
    checkpoint.export(ours, tmp_path / "model.safetensors", {})
    printed: dict = {}
    exec("\n".join(loading_lines(to_dict(cfg)["model"], **shape)), printed)
    images = torch.randn(2, 3, cfg.data.image_size, cfg.data.image_size)
    torch.testing.assert_close(printed["model"].eval()(images), ours(images), rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_those_of_the_card_are_refused(tmp_path):
    cfg = compose_config(["model=vit_s32", "optim=sam", "debug=tiny"])
    path = tmp_path / "model.safetensors"
    row = {"run_id": "a", "seed": 0, "step": 1, "m": 8, "evals": {}, "commit": "c", "dirty": False, "world": 1}
    row |= {"hardware": "CPU", "dtype": "fp32", "hours": 0.0, "versions": {}, "manifest": "m", "finished": "now"}
    row |= {"config": to_dict(cfg), "overrides": ["model=vit_s32"]}
    row["weights_sha256"] = checkpoint.export(torch.nn.Linear(2, 2), path, {"run_id": "a"})
    (tmp_path / "model_card.md").write_text(model_card(row))
    assert row["weights_sha256"] in (tmp_path / "model_card.md").read_text()
    assert read_weights(tmp_path).keys() == read_weights(path).keys() == {"weight", "bias"}
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the data of a tensor
    path.write_bytes(content)
    for where in (tmp_path, path):
        with pytest.raises(UserError, match="is not the file that model_card.md describes"):
            read_weights(where)
    os.rename(path, tmp_path / "other.safetensors")  # nothing is known of it
    assert read_weights(tmp_path / "other.safetensors").keys() == {"weight", "bias"}
