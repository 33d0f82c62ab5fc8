"""Training one run: from a configuration to weights and a row of the ledger."""

import sys

from sam_repro.errors import UserError

if sys.platform == "win32":  # no SIGUSR1, no SIGHUP, no limits of memory
    raise UserError("training needs Linux; on Windows run it in WSL 2")
