"""The import direction of ARCHITECTURE.md, read from the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "sam_repro").rglob("*.py"))

# package or module: what of sam_repro it may import
ALLOWED = {
    "errors": set(),
    "config": {"config_log", "config_optim", "errors"},
    "config_check": {"config", "config_optim", "errors"},
    "config_log": set(),
    "config_optim": {"errors"},
    "optim": {"optim"},
    "data": {"data", "config", "errors"},
    "models": {"config", "errors", "optim", "cifar_models", "layers"},
    "cifar_models": set(),
    "layers": set(),
    "initial": {"errors"},
    "distributed": {"errors", "heartbeat"},
    "heartbeat": {"errors"},
    "failure": {"lock"},
    "tracking": {"config"},
    "checkpoint": {"errors"},
    "lock": {"errors"},
    "signals": set(),
    "log": {"config", "tracking"},
    "ledger": {"errors"},
    "objective": {"config", "config_optim", "distributed", "errors", "models", "optim"},
    "evaluate": {"config", "data", "distributed"},
}
NO_TORCH = {"errors", "config", "config_check", "config_log", "config_optim", "ledger", "cli", "paper", "signals"}
NO_TORCH |= {"lock", "log", "tracking", "failure", "launch"}


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Dotted names that a file imports; with lazy=False only those at module level."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "sam_repro" else {f"sam_repro.{a.name}" for a in node.names}
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT / "sam_repro").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_direction(path):
    allowed = ALLOWED.get(part(path))
    ours = {n.split(".")[1] for n in imports(path, lazy=True) if n.startswith("sam_repro.")}
    if allowed is not None:
        assert ours <= allowed | {part(path)} | ({"__version__"} if part(path) == "data" else set())
    if part(path) in NO_TORCH:
        top = {n.split(".")[0] for n in imports(path, lazy=False)}
        assert not top & {"torch", "timm", "torchvision", "ffcv"}
        assert "train" not in {n.split(".")[1] for n in imports(path, lazy=False) if n.startswith("sam_repro.")}


def test_ffcv_is_imported_in_one_file():
    users = [p.name for p in FILES if any(n.split(".")[0] == "ffcv" for n in imports(p, lazy=True))]
    assert users == ["ffcv_loader.py"]


OTHERS = sorted(path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", [*FILES, *OTHERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 350
