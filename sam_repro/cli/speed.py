"""What a step costs."""

from sam_repro.paper.speed import __doc__, add_arguments, run  # noqa: F401
