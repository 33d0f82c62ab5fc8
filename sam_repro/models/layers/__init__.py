"""Layers of timm's models that have faster kernels on a GPU: the same parameters, keys and values."""
