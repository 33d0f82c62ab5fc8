"""`python -m sam_repro.cli`, for torchrun."""

import sys

from sam_repro.cli.main import main

sys.exit(main())
