"""A worker of `sam-repro run --per-gpu`: runs from stdin, one a line, in one process; an answer a line on stdout.

What a run prints goes to stderr, which the pool sends to a log file. A run that fails is answered as such; a worker
that dies costs the pool its current run only.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from typing import Any

from sam_repro.config.compose import compose_config
from sam_repro.errors import UserError
from sam_repro.records.lock import Held
from sam_repro.training.signals import STOPS, Interrupted, handle

KEEP = 16  # runs after which a worker forgets its compiled code


def main() -> None:
    """Answer until stdin ends or a run was told to stop."""
    handle(STOPS, leave)  # a run takes them over until it ends
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for runs, line in enumerate(sys.stdin, 1):
        answer = attempt(json.loads(line))
        answers.write(json.dumps(answer) + "\n")
        if answer["status"] == "stopped":
            return
        fresh(keep_code=runs % KEEP != 0)


def leave(number: int, frame: Any) -> None:
    """Told to stop before a run has begun or after it has ended."""
    raise Interrupted(128 + number)


def attempt(task: dict[str, Any]) -> dict[str, str]:
    """One run, as `python train.py <overrides>` would do it: {"status": ..., "why": ...}."""
    try:
        from sam_repro.training.main import main as train  # an exception in here leaves modules half made

        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # which pool.py blocked in a new worker
        cfg = compose_config(task["overrides"])
        cfg.log.progress = "lines"
        if task["ledger"]:
            cfg.log.ledger_dir = task["ledger"]
        return {"status": train(cfg, task["overrides"])["status"]}
    except Interrupted:
        return {"status": "stopped"}
    except Held as error:
        return {"status": "held", "why": str(error)}
    except UserError as error:
        return {"status": "failed", "why": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {
            "status": "failed",
            "why": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        }


def fresh(*, keep_code: bool = False) -> None:
    """Forget the last run's memory and its compiled code; or keep the code, which a run of the same shapes then uses.

    torch.compile traces a ViT for half a minute even where everything it makes is cached on disk. It keeps a limited
    number of variants of a function, and beyond that falls back to eager code without a word: the limit is raised to
    what KEEP runs can need.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch._dynamo.config.recompile_limit = 8 * KEEP
    if not keep_code:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
