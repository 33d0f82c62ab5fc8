"""The command line of `sam-repro train`, which `python train.py` calls: Hydra around `training.main`."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import yaml

from sam_repro.config.checks import refuse_unread, validate
from sam_repro.config.compose import explain, refuse_words, register_schema, typed
from sam_repro.config.files import choices, config_dir, folders
from sam_repro.errors import DIVERGED, RankLost, UserError
from sam_repro.records import failure
from sam_repro.training.signals import Interrupted, StopSignal, ignore_signals

if TYPE_CHECKING:  # Hydra takes half a second: `--help` does without
    from omegaconf import DictConfig

HELP = """usage: sam-repro train [folder=name] [key=value]     (in a checkout also: python train.py)

Train one model with one method, evaluate it, and write one ledger row.

  python train.py model=vit_b32 optim=gsam data.root=/data/imagenet
  python train.py model=vit_b32 optim=gsam debug=tiny        # in seconds, on any machine
  python train.py -m experiment=demo optim=vanilla,sam,gsam seed=0,1,2

== Choices (folder=name) ==
{choices}
Any key of the configuration can be given as key=value; `--cfg job --resolve` prints them all, and
sam_repro/config/schema.py explains each one. The same command again resumes, or says that the run is done.
--config-dir adds a folder like configs/; `--hydra-help` lists Hydra's other options."""


def typed_overrides() -> list[str]:
    """The key=value words of this process's command line."""
    return [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]


def own_folders() -> list[Path]:
    """The folders like configs/ that this process's command line names; prints the help where it asks for it."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", "--config-path", "-cp", type=Path, action="append", default=[])
    parser.add_argument("--cfg", "-c")  # Hydra's, which else would be short for -cd
    parser.add_argument("--help", "-h", action="store_true")
    given, _ = parser.parse_known_args()
    if given.help:
        lists = (f"{folder}: {', '.join(choices(folder, *given.config_dir))}" for folder in folders(*given.config_dir))
        print(HELP.format(choices="\n".join(lists)))
        sys.exit(0)
    return given.config_dir


def cli() -> None:
    """Compose, check, train; exits with the code of the contract in docs/DECISIONS.md."""
    own = own_folders()
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    statuses: list[str] = []
    try:
        for folder in own:
            if not folder.is_dir():
                raise UserError(f"there is no folder {folder} with configuration files")
        refuse_words(typed_overrides(), *own)
        compose_and_train(statuses)
    except Interrupted:
        ignore_signals()
        raise
    except (UserError, RankLost) as error:
        say(f"error: {error}", statuses)
        sys.exit(failure.exit_code(error))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        say(f"error: {explain(error, typed_overrides(), *own)}", statuses)
        sys.exit(2)
    except OSError as error:
        if not failure.is_about_files(error):
            raise
        print(f"error: {error}; what was saved is intact, the same command goes on from there", file=sys.stderr)
        sys.exit(failure.exit_code(error))
    except KeyboardInterrupt:  # before training began, or a second time while it saves
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if "diverged" in statuses:
        sys.exit(DIVERGED)


def compose_and_train(statuses: list[str]) -> None:
    """One run, or several with -m; `statuses` gets the status of each: "training", then that of its ledger row."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let exceptions come here instead of Hydra's own report
    register_schema()
    refused: list[Exception] = []  # kept from Hydra, which would print a line of its own before ours

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def run(cfg: DictConfig) -> None:
        if refused:  # a multirun ends at its first error
            return
        if statuses and StopSignal.late:  # the run before was just ending
            raise Interrupted(128 + StopSignal.late)
        task = list(HydraConfig.get().overrides.task)
        # A multirun's later runs start when they start.
        process_start = None if statuses else psutil.Process().create_time()
        try:
            unresolved = str(cfg)
            config = typed(cfg)
            validate(config)
            refuse_unread(config, task, unresolved)
            from sam_repro.training.main import main  # torch takes seconds: not before the words are known to be right

            statuses.append("training")
            statuses[-1] = main(config, task, process_start=process_start)["status"]
        except (UserError, RankLost, OSError) as error:
            refused.append(error)

    run()
    if refused:
        raise refused[0]


def say(sentence: str, statuses: list[str]) -> None:
    """Print a line once: before training all ranks refuse the same words, and only one of them says why."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if statuses or rank == "0":
        print(sentence, file=sys.stderr)
