"""Words that our prose does without, as far as a machine can find them: documents, docstrings, comments, YAML."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from sam_repro.errors import plural

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


# ---- one run, two runs -----------------------------------------------------------------------------------------------

COUNTABLE = (
    "run|image|seed|point|product|step|epoch|row|file|class|measurement|iteration|table|claim|pair|eigenvalue|group|"
    "process|checkpoint|folder|deviation|round|search|study|test image|training image"
)
COUNTED_BY_HAND = {  # a number that is never one, or a file that has its own way
    "sam_repro/paper/render/overview.py",  # totals of hundreds
    "sam_repro/paper/render/figures.py",
    "sam_repro/paper/render/sheet.py",
}
AFTER = re.compile(rf" (?:{COUNTABLE})(?:s|es)\b(?!/)")


def numbers_with_a_plural(path: Path) -> Iterator[str]:
    """What an f-string says as "{n} runs": it would say "1 runs". `rounds={n} runs` names a setting and may."""
    for node in ast.walk(ast.parse(path.read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for before, value, after in zip(["", *parts], parts, parts[1:], strict=False):
            setting = isinstance(before, ast.Constant) and str(before.value).endswith("=")
            words = after.value if isinstance(after, ast.Constant) else ""
            if not isinstance(value, ast.FormattedValue) or setting or not (match := AFTER.match(words)):
                continue
            constant = isinstance(value.value, ast.Name) and value.value.id.isupper()
            fraction = value.format_spec is not None and ast.unparse(value.format_spec)[-2] in "fe%"
            if not constant and not fraction:
                yield f"{path.relative_to(ROOT)}:{value.lineno}: {ast.unparse(value.value)}{match[0]}: write plural()"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_one_run_is_not_1_runs(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    if path.suffix == ".py" and not name.startswith("benchmarks") and name not in COUNTED_BY_HAND:
        assert not list(numbers_with_a_plural(path))


def test_plural() -> None:
    assert [plural(n, "run") for n in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
    assert plural(1950, "class", ",") == "1,950 classes" and plural(0.5, "epoch", "g") == "0.5 epochs"


@pytest.mark.parametrize(
    ("text", "caught"),
    [("12 ms a step", True), ("one file a split", True), ("takes a step", False), ("beside", True), ("besides", False)],
)
def test_the_patterns_catch_what_they_should(text: str, caught: bool) -> None:
    assert any(re.search(pattern, text) for pattern in BANNED) is caught
