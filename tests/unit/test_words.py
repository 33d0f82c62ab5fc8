"""Words that our prose does without, as far as a machine can find them: documents, docstrings, comments, YAML."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COUNTED = (
    "[iI]mages|hours|ms|milliseconds|seconds|passes|bytes|runs|seeds|lines|points|copies|calls|steps|GB|MB|TFLOP/s|"
    "products|one|files?|dots?|panels?|several|money|values|perturbations|reductions|sentences?|process|processes"
)
UNITS = (
    "step|run|model|row|table|line|GPU|node|core|second|host|rank|card|party|method|metric|seed|column|epoch|batch|"
    "class|device|group|interval|image|layer|perturbation|day|split|pair|result|module|function|claim|product|worker"
)
BANNED = {
    rf"\b(?:{COUNTED}) an? (?:{UNITS})\b": "per",
    r"\bbeside\b": "next to, with, or compared with",
    r"one time in twenty": "p < 0.05",
    r"\bsays? of (?:it|them|himself|the|a|curvature)": "says about",
    r"\bof theirs\b|\bof older code\b": "theirs, of the code before",
    r"now here, now there": "which run had which value",
    r"\bis no (?:communication|result)\b": "is not",
}
TEXTS = (".md", ".yaml", ".html", ".sh", ".sbatch")
FOLDERS = (".", "docs", "docs/methods", "benchmarks", "slurm", "configs", "results", "sam_repro")


def files() -> list[Path]:
    """The texts that a user or a developer reads."""
    deep = {"configs", "sam_repro"}
    found = [p for f in FOLDERS for p in ((ROOT / f).rglob("*") if f in deep else (ROOT / f).glob("*"))]
    found += [*(ROOT / "results" / "paper").glob("*"), *(ROOT / "results" / "studies").glob("*")]
    return sorted({p for p in found if p.suffix in (*TEXTS, ".py")})


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what people read: of Python its strings and comments, of other files every line."""
    text = path.read_text()
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from enumerate(node.value.splitlines(), node.lineno)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_does_without(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: '{match[0]}': write {instead}"
        for line, text in prose(path)
        for pattern, instead in BANNED.items()
        for match in re.finditer(pattern, text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "caught"),
    [("12 ms a step", True), ("one file a split", True), ("takes a step", False), ("beside", True), ("besides", False)],
)
def test_the_patterns_catch_what_they_should(text: str, caught: bool) -> None:
    assert any(re.search(pattern, text) for pattern in BANNED) is caught
