"""The import law of ARCHITECTURE.md, read from the syntax trees: what is not listed is forbidden."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# package: the packages that it may import, lowest first; itself always. A package that is not named here fails.
LAW = {
    "errors": (),
    "records": ("errors",),
    "config": ("errors",),
    "optim": (),
    "distributed": ("errors",),
    "data": ("errors", "records", "config"),
    "models": ("errors", "records", "config"),
    "curvature": ("errors", "records", "config", "optim", "distributed", "data", "models"),
    "training": ("errors", "records", "config", "optim", "distributed", "data", "models", "curvature"),
    "paper": ("errors", "records", "config"),
    "runner": ("errors", "records", "config", "data", "training", "paper"),
    "cli": ("errors", "records", "config", "optim", "distributed", "data", "models", "curvature", "training", "paper")
    + ("runner",),
}
HEAVY = {"torch", "torchvision", "timm", "triton", "ffcv", "lightning"}
# Packages that import nothing heavy when they are imported, nor from the packages that do.
LIGHT = {"errors", "records", "config", "paper", "runner", "cli"}
HEAVY_PACKAGES = {"optim", "distributed", "models", "curvature", "training"}
# Modules of heavy packages that are light themselves: what a command may import before it is known to be right.
LIGHT_MODULES = {
    "data.beton",
    "data.evalsets",
    "data.datasets",
    "data.manifest",
    "data.loaders.batch_order",
    "data.loaders.threads",
    "data.images.crop",
    "data.write.dataset",
    "data.write.layouts",
    "data.write.torchvision",
    "training.signals",
    "training.wandb_pictures",
    "training.wandb_replay",
    "training.wandb_run",
    "training.wandb_writer",
}
# The functions of light packages that may import heavy ones when they are called, by module.
LATE = {
    "data.write.torchvision",
    "cli.evaluate",
    "cli.sharpness",
    "cli.train",
    "runner.calibrate",
    "runner.worker",
}


def module_of(path: Path, package: Path) -> str:
    """'data.loaders.build' of sam_repro/data/loaders/build.py; a package is called by its name."""
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, *, late: bool) -> set[str]:
    """Dotted names that a module imports; with `late` also those in functions and for type checking."""
    names: set[str] = set()

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if late or not inside:
                if isinstance(child, ast.Import):
                    names.update(alias.name for alias in child.names)
                elif isinstance(child, ast.ImportFrom):
                    assert child.level == 0, "relative imports hide what they import"
                    names.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child, inside or checking or function)

    visit(tree, False)
    return names


def breaches(package: Path) -> list[str]:
    """Every import in a package folder that the law forbids, one sentence each."""
    found = []
    paths = sorted(package.rglob("*.py"))
    modules = {module_of(path, package): ast.parse(path.read_text()) for path in paths if path.parent / path.name}
    for module, tree in modules.items():
        if module == "__init__":
            continue
        home = module.split(".")[0]
        if home not in LAW:
            found.append(f"{module}: the law does not name '{home}'")
            continue
        light = home in LIGHT or module in LIGHT_MODULES
        for name in sorted(imports(tree, late=True)):
            top, _, rest = name.partition(".")
            if top != "sam_repro":
                continue
            if (target := rest.split(".")[0]) not in (home, "__version__", *LAW[home]):
                found.append(f"{module} imports {name}: {home} may not import {target}")
        for late in (False, True):
            if not light or (late and module in LATE):
                continue
            for name in sorted(imports(tree, late=late)):
                parts = name.split(".")
                ours = parts[0] == "sam_repro" and len(parts) > 1 and parts[1] in HEAVY_PACKAGES | {"data"}
                heavy = ours and not any(f"{name}.".startswith(f"sam_repro.{m}.") for m in LIGHT_MODULES)
                heavy = heavy and not (home == "data" and parts[1] == "data")
                if (parts[0] in HEAVY or heavy) and not checking_only(tree, name):
                    found.append(f"{module} imports {name}{' in a function' * late}: it is to work without torch")
    return sorted(set(found))


def checking_only(tree: ast.AST, name: str) -> bool:
    """Whether every import of `name` stands under `if TYPE_CHECKING`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    inside = sum(name in imports(ast.Module([child], []), late=True) for b in blocks for child in b.body)
    outside = sum(
        name in imports(ast.Module([node], []), late=True)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    return outside == inside


def test_the_package_obeys():
    assert breaches(ROOT / "sam_repro") == []


PLANTED = {
    "a circle": ("paper/a.py", "from sam_repro.runner.plan import finished", "paper may not import runner"),
    "an arrow up": ("optim/a.py", "from sam_repro.training import main", "optim may not import training"),
    "the command line": ("training/a.py", "from sam_repro.cli.main import main", "training may not import cli"),
    "up, in a function": ("models/a.py", "def f():\n    import sam_repro.cli.main", "models may not import cli"),
    "a new package": ("novel/a.py", "", "the law does not name 'novel'"),
    "a new module": ("novel.py", "", "the law does not name 'novel'"),
    "torch": ("paper/a.py", "import torch", "it is to work without torch"),
    "torch in a function": ("paper/a.py", "def f():\n    import torch", "it is to work without torch"),
    "what brings torch": ("cli/a.py", "from sam_repro.models.build import build_model", "it is to work without torch"),
    "a class body": ("records/a.py", "class A:\n    import timm", "it is to work without torch"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_import_is_found(kind, tmp_path):
    path, text, complaint = PLANTED[kind]
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text + "\n")
    assert any(complaint in breach for breach in breaches(tmp_path)), breaches(tmp_path)


def runtime_imports(node: ast.AST) -> set[str]:
    """Dotted names that a module imports when it runs: in functions too, not under `if TYPE_CHECKING`."""
    names: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        names |= imports(ast.Module([child], []), late=True) if isinstance(child, IMPORT) else runtime_imports(child)
    return names


IMPORT = (ast.Import, ast.ImportFrom)


def circle(package: Path) -> list[str]:
    """Modules of a package folder that import each other in a circle, the first one again at its end; [] without."""
    paths = {module_of(path, package): path for path in sorted(package.rglob("*.py"))}
    uses: dict[str, set[str]] = {}
    for module, path in paths.items():
        uses[module] = set()
        for name in runtime_imports(ast.parse(path.read_text())):
            parts = name.removeprefix("sam_repro.").split(".") if name.startswith("sam_repro.") else []
            prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            target = next((prefix for prefix in prefixes if prefix in paths), module)
            uses[module] |= {target} - {module}
    try:
        graphlib.TopologicalSorter(uses).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(ROOT / "sam_repro") == []


@pytest.mark.parametrize(
    "second",
    ["from sam_repro.paper import a", "def f():\n    from sam_repro.paper.a import g", "import sam_repro.paper.a"],
)
def test_a_planted_circle_is_found(tmp_path, second):
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "__init__.py").touch()
    (tmp_path / "paper" / "a.py").write_text("from sam_repro.paper.b import f\n")
    (tmp_path / "paper" / "b.py").write_text(second + "\n")
    assert set(circle(tmp_path)) == {"paper.a", "paper.b"}
    checking = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sam_repro.paper.a import g\n"
    (tmp_path / "paper" / "b.py").write_text(checking)
    assert circle(tmp_path) == []


def test_architecture_prints_the_law():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    printed = dict(re.findall(r"^\| `(\w+)` +\| ([\w, -]+?) +\|", text, re.MULTILINE))
    assert printed == {home: ", ".join(may) or "-" for home, may in LAW.items()}


def test_ffcv_is_imported_in_one_file():
    files = (ROOT / "sam_repro").rglob("*.py")
    users = [
        p.name for p in files if any(n.split(".")[0] == "ffcv" for n in imports(ast.parse(p.read_text()), late=True))
    ]
    assert users == ["ffcv_loader.py"]


def long_functions(folder: Path) -> list[str]:
    """Functions of more lines than fit on a screen."""
    return [
        f"{path.relative_to(folder)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"  # pyright: ignore
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60  # pyright: ignore
    ]


def test_a_function_fits_on_a_screen():
    assert long_functions(ROOT / "sam_repro") == []


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest takes two files of one name for one module"
