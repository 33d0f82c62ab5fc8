"""What the documents tell one to type, typed: the quickstart, the demo, own images, the API pages, the notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ENV, ROOT, train
from PIL import Image
from test_documents import commands


def typed(words: list[str], where: Path, **env: str) -> str:
    """What a command prints that stands in a document: `python` and `sam-repro` are this checkout's."""
    programs = {"python": [sys.executable], "sam-repro": [sys.executable, "-m", "sam_repro.cli"]}
    programs["torchrun"] = [sys.executable, "-m", "torch.distributed.run"]
    words = [str(ROOT / w) if w == "train.py" or w.startswith("benchmarks/") else w for w in words]
    done = subprocess.run(
        [*programs[words[0]], *words[1:]], cwd=where, env=ENV | env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def that(page: str, pattern: str) -> list[str]:
    """The first command of a page that has this in it."""
    return next(words for words in commands(page) if re.search(pattern, " ".join(words)))


def test_make_help():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in ("install ", "demo ", "test-gpu ", "api "))


def test_make_says_why_it_installs_again(tmp_path):
    """With an installer that only notes that it ran, and a marker older than pyproject.toml."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "install.sh").write_text("#!/bin/sh\nmkdir -p $1; echo installs\n")
    (tmp_path / "install.sh").chmod(0o755)
    (tmp_path / "pyproject.toml").touch()

    def make() -> str:
        return subprocess.run(["make", "-s", "install"], cwd=tmp_path, capture_output=True, text=True).stdout

    assert make() == "installs\n"
    assert "installs" not in make()
    later = (tmp_path / ".venv/ready").stat().st_mtime + 10
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert make() == "pyproject.toml is newer than .venv: installing again\ninstalls\n"


@pytest.mark.slow
def test_help_as_typed(tmp_path):
    for page in ("benchmarks/README.md", "docs/methods/README.md"):
        for words in commands(page):
            if "--help" in words:
                assert "usage: " in typed(words, tmp_path)


@pytest.mark.slow
def test_own_images_as_typed(tmp_path):
    """Section 4 of Getting started, with 7 classes. Words at the end of its line make model and run small."""
    noise = np.random.default_rng(0)
    for split, images in (("train", 40), ("val", 2)):
        for name in range(7):
            folder = tmp_path / "photos" / split / f"class{name}"
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    page = "docs/GETTING_STARTED.md"
    typed(that(page, "write imagefolder"), tmp_path)
    short = ["model.tiny=true", "recipe.steps=2", "recipe.warmup_steps=1", "data.image_size=32", "data.eval_resize=32"]
    output = typed([*that(page, "data.name=mine"), *short, "train.device=cpu", "sharpness.images=8"], tmp_path)
    run = re.search(r"^(\S+) done: val", output, re.MULTILINE)[1]
    assert " of 14 " in typed([w.replace("<run_id>", run) for w in that(page, "evaluate runs/")], tmp_path)


@pytest.mark.slow
def test_the_demo_as_typed(tmp_path):
    """One run of it, then what Curvature and W&B say about it, on few images and steps."""
    short = ["recipe.steps=60", "sharpness.every=20"]
    output = typed([*that("docs/GETTING_STARTED.md", "experiment=demo"), *short], tmp_path)
    run = re.search(r"^(\S+) done: ", output, re.MULTILINE)[1]
    output = typed([*that("docs/WANDB.md", "sam-repro sync"), "--mode", "offline"], tmp_path)
    assert output.startswith(f"(1/1) runs/demo/{run}")
    few = {"eigen": [], "gap": [], "spectrum": ["--max-steps", "5"], "slice": ["--points", "3"]}
    for what, limits in few.items():
        assert f"{what}.svg" in typed([*sharpness(what, run), "--images", "32", *limits], tmp_path)
    for what in ("decay", "alignment"):
        assert f"{what}.svg" in typed(sharpness(what, run), tmp_path)
    ranks = [w.replace("<run_id>", f"demo/{run}") for w in that("docs/CURVATURE.md", "^torchrun .* sharpness eigen")]
    ranks = ["--nproc-per-node=2" if w.startswith("--nproc") else w for w in ranks]
    assert typed([*ranks[:-1], "32"], tmp_path).count("sigma_max") == 1
    assert typed(that("docs/WANDB.md", "--entity"), tmp_path) == "dashboard-table1.json\n"


def sharpness(what: str, run: str) -> list[str]:
    words = that("docs/CURVATURE.md", "sharpness <what>")
    return [word.replace("<what>", what).replace("<run_id>", f"demo/{run}") for word in words]


@pytest.mark.slow
def test_the_quickstart_runs_as_typed(tmp_path):
    (words,) = (w for w in commands("README.md") if "debug=tiny" in w)
    assert words[:2] == ["python", "train.py"]
    assert " done: val " in train(tmp_path, *words[2:])


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
