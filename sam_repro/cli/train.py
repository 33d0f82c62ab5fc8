"""The command line of `python train.py`: Hydra around `training.main`, one sentence for whatever is wrong."""

from __future__ import annotations

import os
import sys

import hydra
import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_repro.config.checks import validate
from sam_repro.config.compose import all_choices, config_dir, explain, refuse_base_files, register_schema, typed
from sam_repro.errors import RankLost, UserError
from sam_repro.records import failure
from sam_repro.training.signals import Interrupted, StopSignal, ignore_signals


def typed_overrides() -> list[str]:
    """The key=value words of this process's command line."""
    return [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]


def cli() -> None:
    """Compose, check, train; exits with the code of ARCHITECTURE.md's contract."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let exceptions come here instead of Hydra's own report
    register_schema()
    OmegaConf.register_new_resolver("choices", all_choices, replace=True)  # of the help in configs/config.yaml
    statuses: list[str] = []
    refused: list[Exception] = []  # kept from Hydra, which would print a line of its own before ours
    trained = False  # before that all ranks refuse the same words: one says why

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def run(cfg: DictConfig) -> None:
        nonlocal trained
        if refused:  # a multirun ends at its first error
            return
        if statuses and StopSignal.late:  # the run before was just ending
            raise Interrupted(128 + StopSignal.late)
        task = list(HydraConfig.get().overrides.task)
        born = None if statuses else psutil.Process().create_time()  # a multirun's later runs start when they start
        try:
            config = typed(cfg)
            validate(config)
            trained = True
            from sam_repro.training.main import (
                main,  # torch and timm take seconds: not before the words are known to be right
            )

            statuses.append(main(config, task, born=born)["status"])
        except (UserError, RankLost, OSError) as error:
            refused.append(error)

    def say(sentence: str) -> None:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if trained or rank == "0":
            print(sentence, file=sys.stderr)

    try:
        refuse_base_files(typed_overrides())
        run()
        if refused:
            raise refused[0]
    except Interrupted:
        ignore_signals()
        raise
    except (UserError, RankLost) as error:
        say(f"error: {error}")
        sys.exit(failure.exit_code(error))
    except (HydraException, OmegaConfBaseException) as error:
        say(f"error: {explain(error, typed_overrides())}")
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
        sys.exit(3)
