"""What the documents show works: Python blocks run as printed, commands are accepted as typed, links lead somewhere.

Every command is run here, in a test of its own, or stands in a list with the reason why not.
"""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from importlib import import_module
from itertools import dropwhile
from pathlib import Path

import pytest
import torch

from sam_repro.cli.main import main
from sam_repro.config.compose import compose_config
from sam_repro.paper.render.overview import EVIDENCE

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".", "slurm", "benchmarks", "docs", "docs/methods")
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

PAGES = sorted(str(p.relative_to(ROOT)) for d in FOLDERS for p in (ROOT / d).glob("*.md") if p.name != "CHANGELOG.md")
READERS = ("plan", "estimate", "table", "status", "figures")  # commands that only read the ledger: run as typed, here
ELSEWHERE = ("source", "sbatch", "pip", "cd", "git", "squeue", "cat", "head", "wandb")  # not ours
SETTINGS = r"(?:[A-Z_]+=(?:\S+|\"[^\"]*\")? )*"
PROGRAM = rf"{SETTINGS}(?:make|python|sam-repro|torchrun|wandb|benchmarks/\S+\.sh|\./install\.sh) \S"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


# What a page mentions without the rest of the line: nobody types it.
MENTIONED = (
    r"\.\.\.|write (imagenet|arrays)$|write --max|estimate --cal|sharpness slice$|table (<|--format brief$)|=linf"
)


def lines(page: str) -> list[str]:
    """What a page tells one to type: in blocks of bash and console, indented, or in the text with an argument."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = {kind: [b for k, b in FENCED.findall(text) if k == kind] for kind in ("bash", "console")}
    found = [line for block in blocks["bash"] for line in block.splitlines()]
    found += [line[2:] for block in blocks["console"] for line in block.splitlines() if line.startswith("$ ")]
    text = FENCED.sub("", text)
    found += [line.strip() for line in re.findall(rf"^ {{4}}({PROGRAM}.*)$", text, re.MULTILINE)]
    inline = [" ".join(code.split()) for code in re.findall(rf"`({PROGRAM}[^`]*)`", text)]
    found += [code for code in inline if code.count(" ") > 1 or code.startswith(("make", "./install.sh"))]
    return [line for line in found if not re.search(MENTIONED, line)]


def commands(page: str) -> list[list[str]]:
    """The commands of a page, as words, without comments, redirections and settings of the environment."""
    parts = [part for line in lines(page) for part in re.split(r" && |; ", re.sub(r"\s# .*|\s+$", "", line))]
    parts = [re.sub(r"<[^>]*>", lambda m: m[0].replace(" ", "_"), part.split(" > ")[0]) for part in parts]
    found = [shlex.split(re.sub(r"\$\([^)]*\)", "9", part)) for part in parts]
    found = [list(dropwhile(re.compile(r"[A-Z_]+=").match, words)) for words in found]
    return [words for words in found if words]


# A command that is not run here: the test that runs it, or why none does. The first pattern that matches counts.
OTHERS = {
    r"^(source|sbatch|squeue|pip|cat|head|wandb|git|cd) ?": "not ours",
    r"^make install|^./install.sh": "installs from the network",
    r"^make demo": "the demo's nine runs take five minutes: `make demo`",
    r"^make api": "tests/integration/test_documents_run.py::test_make_api_makes_pages",
    r"^make help": "tests/integration/test_documents_run.py::test_make_help",
    r"^make (lint|check|test)": "they run the tests and checks themselves",
    r"--download": "needs the network",
    r"/data/|data\.root=\.\.\.": "needs ImageNet, or test sets of that size",
    r"data/imagenette160|imagenette": "needs Imagenette and a GPU",
    r"--gpus|torchrun(?!.*sharpness)|--peers|<gpu>|debug=profile|all\.sh|evidence\.sh|eigen_cost": "needs GPUs",
    r"^sam-repro run table1$": "needs ImageNet",
    r"optim=gsam debug=tiny": "tests/integration/test_documents_run.py::test_the_quickstart_runs_as_typed",
    r"write imagefolder|data\.name=mine|evaluate runs/": (
        "tests/integration/test_documents_run.py::test_own_images_as_typed"
    ),
    r"experiment=demo optim=sam|run demo|sync runs|sharpness |--preview|--entity": (
        "tests/integration/test_documents_run.py::test_the_demo_as_typed"
    ),
    r"benchmarks/\w+\.py --help|train\.py --help": "tests/integration/test_documents_run.py::test_help_as_typed",
    r"benchmarks/report\.py (speed|--check|codes|--write)": "tests/unit/test_benchmark_report.py",
    r"benchmarks/(step|curvature)\.py .*--device cpu": "minutes of a processor: tests/integration/test_benchmark.py",
    r"benchmarks/loader\.py --images": "needs photographs",
    r"^sam-repro report": "tests/integration/test_report.py",
    r"^sam-repro check": "make check",
}

ALL = [pytest.param(words, id=f"{page}: {' '.join(words)[:60]}") for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", ALL)
def test_every_command_is_accepted(words, tmp_path, monkeypatch):
    """What only reads is run. What trains, writes or measures is parsed or composed, down to its last word."""
    monkeypatch.chdir(ROOT)
    program, *rest = words
    if program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in rest)
    elif "train.py" in words:
        typed = [word for word in words[words.index("train.py") + 1 :] if "=" in word]
        typed = [re.sub("<.*>", "1", word) for word in typed]
        compose_config([word.split(",")[0] if "-m" in words else word for word in typed])
    elif program == "python" or program.startswith("benchmarks/"):
        script = (ROOT / next(word for word in words if word.startswith("benchmarks/"))).read_text()
        assert all(f'"{word}"' in script for word in rest if word.startswith("--") and word != "--help")
    elif "sam-repro" in words or "sam_repro.cli" in words:
        name, *rest = words[1 + max(words.index(x) for x in ("sam-repro", "sam_repro.cli") if x in words) :]
        if name in READERS:
            assert main([name, *rest, *(["--output", str(tmp_path)] if name == "figures" else [])]) == 0
        elif name == "train":
            compose_config(rest)
        else:
            module, parser = import_module(f"sam_repro.cli.{name}"), ArgumentParser()
            module.add_arguments(parser)
            parser.parse_intermixed_args(["eigen" if word == "<what>" else word for word in rest])
    else:
        assert program in ELSEWHERE or program == "./install.sh", f"the test does not know {program}"


@pytest.mark.parametrize("words", ALL)
def test_every_command_is_run_somewhere_or_it_is_said_why_not(words):
    typed = " ".join(words)
    if re.match(rf"sam-repro ({'|'.join(READERS)})\b", typed):
        return  # run above
    how = next((how for pattern, how in OTHERS.items() if re.search(pattern, typed)), None)
    assert how, f"{typed}: run it in a test, or say in OTHERS why no test does"
    file, _, name = how.partition("::")
    if how.startswith("tests/"):
        assert f"def {name}" in (ROOT / file).read_text()


def test_no_reason_is_left_over():
    every = [" ".join(param.values[0]) for param in ALL]
    used = {next((p for p in OTHERS if re.search(p, typed)), None) for typed in every}
    assert used >= set(OTHERS)


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


# ---- links ---------------------------------------------------------------------------------------------------------

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
