"""Make official_gsam.json: run the authors' JAX `gsam_gradient` on a small network in float64.

    git clone https://github.com/google-research/big_vision && git -C big_vision checkout 0127fb6
    python -m venv jax && jax/bin/pip install "jax[cpu]"
    PYTHONPATH=big_vision jax/bin/python tests/numerics/official_gsam.py

Not part of the tests, which only read the numbers. jax.tree_map, which the official file calls, has left JAX since.
"""

from __future__ import annotations

import json
from pathlib import Path

SIZES = {"b1": (4,), "b2": (2,), "w1": (3, 4), "w2": (4, 2)}
METHOD = {"rho_max": 0.6, "rho_min": 0.1, "alpha": 0.4, "lr": 1e-3, "lr_max": 3e-3, "lr_min": 3e-5}


def wave(shape: tuple[int, ...], start: float) -> list[float]:
    """Numbers that need no generator: sin(start + 1.7 i)."""
    import math

    return [math.sin(start + 1.7 * i) for i in range(math.prod(shape))]


def main() -> None:
    """Write the loss and the gradient of the four variants."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    if not hasattr(jax, "tree_map"):
        jax.tree_map = jax.tree_util.tree_map
    from big_vision.trainers.proj.gsam.gsam import gsam_gradient

    params = {name: jnp.array(wave(shape, k)).reshape(shape) for k, (name, shape) in enumerate(SIZES.items())}
    x, y = jnp.array(wave((5, 3), 0.5)).reshape(5, 3), jnp.array([0, 1, 1, 0, 1])

    def loss(params, x, y):
        logits = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    rows = []
    for minimize_fp in (True, False):
        for adaptive in (False, True):
            switches = {"minimize_fp": minimize_fp, "adaptive_perturbation": adaptive}
            value, gradient = gsam_gradient(loss, params, x, y, **METHOD, **switches)
            flat = {name: gradient[name].reshape(-1).tolist() for name in SIZES}
            rows.append(switches | {"loss": float(value), "gradient": flat})
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
