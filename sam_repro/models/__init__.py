"""timm's models, initialised as the reference does, and what a run differentiates."""
