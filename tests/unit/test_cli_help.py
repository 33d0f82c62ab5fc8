"""Help comes at once: every command shows its own without torch, which takes seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sam_repro.cli import sharpness as sharpness_command
from sam_repro.cli.main import COMMANDS

PROGRAM = """
import sys
from sam_repro.cli.main import main
try:
    sys.exit(main())
finally:
    print("imported:", *{"torch", "torchvision", "timm", "ffcv"} & sys.modules.keys())
"""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_needs_no_torch(command):
    words = [sys.executable, "-c", PROGRAM, *command.split(), "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(f"usage: sam-repro {command}") and done.stdout.endswith("\nimported:\n")


def test_the_command_knows_what_there_is_to_draw():
    from sam_repro.cli.sharpness_pictures import DRAW
    from sam_repro.curvature.reports import REPORTS

    assert set(sharpness_command.OF_WEIGHTS) == set(REPORTS)
    assert set(DRAW) == {*sharpness_command.OF_WEIGHTS, *sharpness_command.OF_LOGS, *sharpness_command.OF_NOTHING}


def test_windows_is_told_to_use_wsl():
    program = (
        "import sys, psutil; sys.platform = 'win32'; from sam_repro.cli import main; sys.exit(main.main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: training needs Linux; on Windows run it in WSL 2\n"
