"""What the documents show works: Python blocks run as printed, commands are accepted as typed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
from commands import train

from sam_repro.cli.main import main
from sam_repro.config.compose import compose_config
from sam_repro.paper.render.overview import EVIDENCE

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


PYTHON = [("README.md", 1), ("docs/OWN_LOOP.md", 7), ("docs/CURVATURE.md", 1), ("docs/methods/README.md", 1)]


def blocks(name: str) -> list[str]:
    return BLOCK.findall((ROOT / name).read_text())


@pytest.mark.parametrize(("name", "least"), PYTHON)
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
    exec(blocks("docs/OWN_LOOP.md")[0], names)
    opt, model = names["opt"], names["model"]
    assert {int(s["step"]) for s in opt.state_dict()["state"].values()} == {len(names["batches"])}
    assert all(p.grad is None for p in model.parameters())
    assert int(model[1].num_batches_tracked) == len(names["batches"])


# ---- the commands of README and docs ---------------------------------------------------------------------------------

SHELL = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(str(p.relative_to(ROOT)) for d in (".", "slurm", "benchmarks", "docs") for p in (ROOT / d).glob("*.md"))
READERS = ("plan", "estimate", "table", "status", "figures")  # commands that only read the ledger: run as typed
ELSEWHERE = ("source", "sbatch", "pip", "cd", "git")  # not ours


def commands(page: str) -> list[list[str]]:
    """The commands in a page's bash blocks, as words, without comments and redirections."""
    lines = [line for block in SHELL.findall((ROOT / page).read_text()) for line in block.splitlines()]
    parts = [part for line in lines for part in line.split(" && ")]
    found = [shlex.split(part.split(" > ")[0], comments=True) for part in parts]
    return [words for words in found if words]


ALL = [pytest.param(words, id=f"{page}: {' '.join(words)[:60]}") for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", ALL)
def test_every_command_is_accepted(words, tmp_path, monkeypatch):
    """What only reads is run. What trains, writes or measures is parsed or composed, down to its last word."""
    monkeypatch.chdir(ROOT)
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif "train.py" in words:
        typed = [word for word in words[words.index("train.py") + 1 :] if "=" in word]
        compose_config([word.split(",")[0] if "-m" in words else word for word in typed])
    elif program == "sam-repro" and rest[0] in READERS:
        output = ["--output", str(tmp_path)] if rest[0] == "figures" else []
        assert main([*rest, *output]) == 0
    elif program == "sam-repro":
        module, parser = import_module(f"sam_repro.cli.{rest[0]}"), ArgumentParser()
        module.add_arguments(parser)
        parser.parse_intermixed_args(rest[1:])
    else:
        assert program in ELSEWHERE, f"the test does not know {program}"


HTML = re.findall(
    r"\w+",
    "a blockquote body code dd div dl dt em footer head header html img input label li main meta nav p path pre script "
    "section span strong style svg title ul wbr",
)


@pytest.mark.slow
def test_make_api_makes_pages(tmp_path):
    """`make api` as typed, but for its folder: quiet, a page per module, arguments as lists."""
    pytest.importorskip("pdoc")
    line = next(x for x in (ROOT / "Makefile").read_text().splitlines() if "-m pdoc" in x)
    modules = re.search(r"^API := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    typed = [sys.executable, *line.replace("-o build/api", f"-o {tmp_path}").split()[1:-1]]
    made = subprocess.run(
        [*typed, *(f"sam_repro.{name}" for name in modules)], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0 and not made.stdout + made.stderr
    pages = {name: (tmp_path / "sam_repro" / f"{name.replace('.', '/')}.html").read_text() for name in modules}
    tags = {tag for page in pages.values() for tag in re.findall(r"<([a-z_]+)[ ,>]", page)}
    assert tags <= set(HTML), "what stands in <> outside of backticks is lost"
    assert "<strong>alpha:</strong>" in pages["optim"] and "<script src" not in pages["optim"]


SECTION = re.compile(r"^\s*(?:Args|Arguments|Returns|Raises|Attributes)\b.*:$", re.MULTILINE)


def test_docstrings_have_sections_that_the_api_pages_know():
    """ "Args (besides ...):" would be one paragraph."""
    texts = {path: path.read_text() for path in (ROOT / "sam_repro").rglob("*.py")}
    found = [(path.name, head) for path, text in texts.items() for head in SECTION.findall(text)]
    assert len(found) > 100
    assert not [
        (name, head) for name, head in found if head.strip() not in ("Args:", "Returns:", "Raises:", "Attributes:")
    ]


def test_readme_fits_two_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_quickstart_runs_as_typed(tmp_path):
    (words,) = (w for w in commands("README.md") if "debug=tiny" in w)
    assert words[:2] == ["python", "train.py"]
    assert " done: val " in train(tmp_path, *words[2:])


# ---- links and the notebook ------------------------------------------------------------------------------------------

EVERY_PAGE = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "runs", "data"} & set(path.parts))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append(link)
    assert not dead


def test_readme_shows_the_evidence_that_the_page_shows():
    assert f"](results/figures/{EVIDENCE}.svg)" in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, one_thread):
    """Its cells run in order. They print what is stored in the notebook; only the last digits of numbers may differ."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "docs" / "digits.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {}
    for source in sources:
        lines = [line for line in source.splitlines() if not line.startswith("%")]
        exec(compile("\n".join(lines), "digits.ipynb", "exec"), names)
    top = {name: names["dominant"](hessian).value for name, hessian in names["hessians"].items()}
    assert top["AdamW"] > 2 * top["SAM"] and top["AdamW"] > 2 * top["GSAM"]
