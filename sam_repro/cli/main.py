"""`sam-repro`: training, and the commands around it: each is a module with add_arguments(parser) and run(args).

A module is imported when its command is called, and torch when one needs it: planning, tables and --help never wait.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module
from io import TextIOWrapper

from sam_repro import __version__
from sam_repro.config.compose import nearest
from sam_repro.errors import RankLost, UserError, out_of_memory
from sam_repro.records.failure import is_about_files

# module of this package: what it does, in one line
COMMANDS = {
    "train": "train one model with one method; in a checkout also `python train.py`",
    "write": "turn image folders into .beton files with a manifest",
    "evaluate": "measure the accuracy of any weights on any test set",
    "run": "train the runs of a table that are missing in the ledger",
    "plan": "list the runs of a table, for instance for a SLURM array",
    "table": "print our numbers and the paper's, with intervals and verdicts",
    "figures": "draw the figure of a table",
    "estimate": "say what a table costs, from measured speeds",
    "status": "count the runs of each table: done, running, failed, waiting",
    "sharpness": "measure eigenvalues, surrogate gap and loss slices of a run; draw the papers' toys",
    "report": "write everything as one page, results/index.html",
    "check": "compute every published number again, and compare",
    "sync": "send the logs of runs to W&B",
    "dashboard": "build a W&B workspace for a table",
}


def main(argv: list[str] | None = None) -> int:
    """The console script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may have any bytes
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    try:
        if name not in COMMANDS:
            raise UserError(f"there is no command '{name}'{nearest(name, list(COMMANDS))}; see sam-repro --help")
        if name == "train":
            return train(rest)
        module = import_module(f"sam_repro.cli.{name}")
        parser = ArgumentParser(
            f"sam-repro {name}", description=module.__doc__, formatter_class=RawDescriptionHelpFormatter
        )
        module.add_arguments(parser)
        return module.run(parser.parse_intermixed_args(rest)) or 0  # words may stand after options
    except (UserError, RankLost) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (RuntimeError, MemoryError) as error:
        lacking = out_of_memory(error)
        if lacking is None:
            raise
        print(f"error: {lacking}", file=sys.stderr)
        return lacking.code
    except ModuleNotFoundError as error:  # the paper half was installed alone
        if error.name is None or error.name.startswith("sam_repro"):
            raise
        what = f"`sam-repro {name}` needs {error.name.split('.')[0]}, which is not installed"
        venv = "`source .venv/bin/activate` first, or install it with ./install.sh or `pip install -e .`"
        print(f"error: {what}; {venv}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `sam-repro table ... | head`
        return 0
    except OSError as error:
        if error.filename is None and not is_about_files(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train(words: list[str]) -> int:
    """What `python train.py <words>` does; leaves with its exit code. Hydra reads the words from sys.argv."""
    from sam_repro.cli.train import cli

    sys.argv = ["sam-repro train", *words]
    cli()
    return 0


def overview() -> str:
    """What `sam-repro --help` prints."""
    lines = ["usage: sam-repro <command> [options]     (more: sam-repro <command> --help)", ""]
    lines += [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    lines += ["", "In a checkout, `python train.py` is `sam-repro train`; its --help lists models, methods and data."]
    return "\n".join(lines)
