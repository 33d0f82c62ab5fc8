"""Every Python block of the documents for library users runs as printed, after the blocks above it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> list[str]:
    return BLOCK.findall((ROOT / name).read_text())


@pytest.mark.parametrize(("name", "least"), [("README.md", 2), ("docs/library.md", 7), ("docs/CURVATURE.md", 1)])
def test_blocks_run_as_printed(name, least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    found = blocks(name)
    assert len(found) >= least
    for block in found:
        exec(compile(block, name, "exec"), names)
    if "opt" in names:
        assert names["opt"].step_state.phase == "clean"
        assert all(p.isfinite().all() for p in names["model"].parameters())


def test_the_loop_steps_as_the_page_says():
    """The weights move, AdamW's moments are in the state, and gradients are cleared."""
    names: dict = {}
    torch.manual_seed(0)
    exec(blocks("docs/library.md")[0], names)
    opt, model = names["opt"], names["model"]
    assert {int(s["step"]) for s in opt.state_dict()["state"].values()} == {len(names["batches"])}
    assert all(p.grad is None for p in model.parameters())
    assert int(model[1].num_batches_tracked) == len(names["batches"])
