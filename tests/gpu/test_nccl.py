"""Real NCCL: the weights after training depend on the batch and on m, not on the number of GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs")]


def train(folder: Path, world: int, *overrides: str) -> dict[str, torch.Tensor]:
    """The weights after 50 steps on `world` ranks."""
    command = [sys.executable]
    command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command += ["train.py", "debug=tiny", "recipe.steps=50", "recipe.batch_size=64", "train.dtype=fp32", "seed=3"]
    command += ["train.compile=false"]
    command += [f"log.runs_dir={folder}/runs", f"log.ledger_dir={folder}/ledger", *overrides]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (weights,) = folder.glob("runs/*/model.safetensors")
    return load_file(weights)


@pytest.mark.parametrize("model", ["vit_s32", "resnet50"])
def test_any_number_of_gpus_gives_the_same_weights(tmp_path, model):
    worlds = [w for w in (1, 2, 4, 8) if w <= GPUS]
    found = {w: train(tmp_path / str(w), w, f"model={model}", "optim=gsam", "optim.m=8") for w in worlds}
    for world in worlds[1:]:
        for name, expected in found[1].items():
            torch.testing.assert_close(found[world][name], expected, rtol=1e-5, atol=1e-5)
