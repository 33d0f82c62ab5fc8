"""The official JAX code, timed as step.py times its parties: big_vision's ViT, GSAM and chain of optimizers.

    python benchmarks/step_jax.py --big-vision ../big_vision --model vit_b16 --parties vanilla gsam-m64-scan-cudnn

`step.py --big-vision DIR` runs this in a process of its own and puts its rows next to the others. DIR is a checkout of
google-research/big_vision; nothing of it is in this project. Needs jax, flax, optax and einops. Same images per step,
224 px and bf16 products as step.py, AdamW without clipping, donated arguments, everything under one `jax.jit`. Parties:

    vanilla         one gradient, one update
    floor           two gradients, one update
    gsam-m<batch>   `gsam_gradient` of the whole batch
    gsam-m64-scan   groups of 64 images, one after the other by `jax.lax.scan`, each with its own perturbation
    gsam-m64-vmap   the same, all at once by `jax.vmap`
    ...-bf16        its position embedding cast to bf16 in the robust pass too, which else runs its residuals in fp32
    ...-cudnn       that, and cuDNN's attention; an odd number of tokens, which cuDNN refuses, is filled up to 64s

What is not yet compiled when --seconds are over is left out. Memory is XLA's own plan: arguments, results, temporaries.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others may be on the same GPU

import flax.linen as nn
import flax.training.checkpoints  # noqa: F401, before `official` puts something in TensorFlow's place
import jax
import jax.numpy as jnp

CUDNN = ("gsam-m{batch}-cudnn", "gsam-m64-scan-cudnn", "gsam-m64-vmap-cudnn", "vanilla-cudnn")
PLAIN = ("vanilla", "gsam-m{batch}", "gsam-m64-scan", "gsam-m64-vmap")
BF16 = ("gsam-m{batch}-bf16", "gsam-m64-scan-bf16", "gsam-m64-vmap-bf16", "floor")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big-vision", type=Path, required=True, help="a checkout of google-research/big_vision")
    parser.add_argument("--model", default="vit_b32", help="vit_<letter><patch>")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--size", type=int, default=224, help="side of an image")
    parser.add_argument("--parties", nargs="*", help="only these")
    parser.add_argument("--skip", nargs="*", default=[], help="not these: jax-<party>")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=4, help="parties that are compiled at once")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which nothing is begun")
    parser.add_argument("--warm", action="store_true", help="compile only, into JAX_COMPILATION_CACHE_DIR")
    return parser.parse_args()


def official(checkout: Path) -> tuple[Any, ...]:
    """big_vision's modules models.vit, optax, trainers.proj.gsam.gsam and utils."""
    sys.path.insert(0, str(checkout))
    for name in ("tensorflow.io.gfile", "ml_collections"):  # for files and configurations, which a step has none of
        for i in range(name.count(".") + 1):
            sys.modules.setdefault(name.rsplit(".", i)[0], ModuleType(name.rsplit(".", i)[0]))
    for name, now in {"tree_map": "map"}.items():  # what later JAX calls otherwise
        if not hasattr(jax, name):
            setattr(jax, name, getattr(jax.tree, now))
    import big_vision.optax as chain  # pyright: ignore[reportMissingImports]
    import big_vision.utils as utils  # pyright: ignore[reportMissingImports]
    from big_vision.models import vit  # pyright: ignore[reportMissingImports]
    from big_vision.trainers.proj.gsam import gsam  # pyright: ignore[reportMissingImports]

    return vit, chain, gsam, utils


class Settings(dict):
    """A configuration as theirs: keys are attributes."""

    __getattr__ = dict.__getitem__


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, kernel: str = "cudnn", **_: Any) -> jax.Array:
    """softmax(q k' / sqrt(D)) v for (B, N, heads, D) by `kernel`; an odd N is filled up, unseen."""
    tokens = query.shape[1]
    call = partial(jax.nn.dot_product_attention, implementation=kernel)
    if tokens % 2 == 0:
        return call(query, key, value)
    fill = ((0, 0), (0, -tokens % 64), (0, 0), (0, 0))
    lengths = jnp.full(len(query), tokens, jnp.int32)
    filled = [jnp.pad(x, fill) for x in (query, key, value)]
    return call(*filled, query_seq_lengths=lengths, key_value_seq_lengths=lengths)[:, :tokens]


@contextmanager
def attention_of(party: str) -> Iterator[None]:
    """cuDNN's attention inside flax's layer while a party with it is traced."""
    before = nn.MultiHeadDotProductAttention
    if party.endswith("-cudnn"):
        nn.MultiHeadDotProductAttention = partial(before, attention_fn=attention)
    try:
        yield
    finally:
        nn.MultiHeadDotProductAttention = before


class Official:
    """A model of the official code: its parameters, its optimizer and the steps of the parties."""

    def __init__(self, args: argparse.Namespace):
        vit, chain, gsam, self.utils = official(args.big_vision)
        letter, patch = re.fullmatch(r"vit_([a-z]+)(\d+)", args.model).groups()  # pyright: ignore
        letter = letter if letter == "mu" else letter.capitalize()
        self.model = vit.Model(1000, variant=f"{letter}/{patch}", pool_type="gap", dtype_mm="bfloat16")
        self.gsam = partial(gsam.gsam_gradient, rho_max=0.1, rho_min=0.1, alpha=0.4, lr=1e-4, lr_max=1.0, lr_min=1.0)
        images = jax.random.randint(jax.random.key(1), (args.batch, args.size, args.size, 3), 0, 256)
        self.images = images.astype(jnp.uint8)
        self.labels = jax.random.randint(jax.random.key(2), (args.batch,), 0, 1000)
        shapes = jax.eval_shape(self.fresh_params)
        settings = Settings(optax_name="scale_by_adam", optax={"mu_dtype": "float32"}, lr=1e-4, wd=1e-5)
        settings["schedule"] = {"decay_type": "linear", "linear_end": 0.01}
        self.optimizer, _ = chain.make(settings, shapes, sched_kw={"total_steps": 1000})

    def fresh_params(self) -> Any:
        return self.model.init(jax.random.key(0), self.images[:1].astype(jnp.float32))["params"]

    def fresh(self) -> tuple[Any, Any]:
        """Parameters and the optimizer's state, on the device."""
        params = jax.jit(self.fresh_params)()
        return params, jax.jit(self.optimizer.init)(params)

    def gradient_of(self, party: str) -> Callable[..., tuple[jax.Array, Any]]:
        """(params, images, labels) -> loss and gradient, as the party takes them."""
        bf16 = party.endswith(("-bf16", "-cudnn"))

        def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
            if bf16:
                params = {**params, "pos_embedding": params["pos_embedding"].astype(jnp.bfloat16)}
            logits, _ = self.model.apply({"params": params}, images / 127.5 - 1, train=True)
            return self.utils.sigmoid_xent(logits=logits, labels=jax.nn.one_hot(labels, 1000))

        def floor(params: Any, *batch: jax.Array) -> tuple[jax.Array, Any]:
            _, first = jax.value_and_grad(loss)(params, *batch)
            params, _ = jax.lax.optimization_barrier((params, first))  # else both would be one
            return jax.value_and_grad(loss)(params, *batch)

        def groups(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
            batches = [x.reshape(-1, m, *x.shape[1:]) for x in (images, labels)]
            if "-vmap" in party:
                found = jax.vmap(partial(self.gsam, loss), in_axes=(None, 0, 0))(params, *batches)
                return jax.tree.map(lambda x: x.mean(0), found)

            def add(total: Any, batch: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, self.gsam(loss, params, *batch)), None

            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), params)  # fp32; the position embedding is bf16
            total, _ = jax.lax.scan(add, (jnp.zeros(()), zeros), batches)
            return jax.tree.map(lambda x: x / len(batches[0]), total)

        if not party.startswith("gsam"):
            return floor if party.startswith("floor") else jax.value_and_grad(loss)
        m = group_of(party)
        return partial(self.gsam, loss) if m == len(self.images) else groups

    def lower(self, party: str) -> Any:
        """The whole step of a party, traced: (params, state, images, labels) -> (params, state, loss)."""
        gradient = self.gradient_of(party)

        def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
            loss, grads = gradient(params, images, labels)
            updates, state = self.optimizer.update(grads, state, params)
            return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates), state, loss

        with attention_of(party):
            return jax.jit(step, donate_argnums=(0, 1)).lower(*jax.eval_shape(self.fresh), self.images, self.labels)


def group_of(party: str) -> int:
    """Images that share a perturbation."""
    found = re.search(r"-m(\d+)", party)
    return int(found[1]) if found else 0


def timed(step: Callable, official: Official, rounds: int, steps: int) -> tuple[list[float], float]:
    """Seconds of a step, round by round, and the last loss."""
    state, loss, times = official.fresh(), jnp.zeros(()), []
    for measured in range(rounds + 1):  # the first is to warm up
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(steps if measured else 3):
            *state, loss = step(*state, official.images, official.labels)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / steps)
    return times[1:], float(loss)


def main() -> None:
    args, begun = arguments(), time.perf_counter()
    one = Official(args)
    plain = (
        one.images.shape[1] // one.model.patch_size[0] % 2
    )  # cuDNN's attention last where it must be fed more tokens
    order = (*PLAIN, *BF16, *CUDNN) if plain else (*CUDNN, *PLAIN, *BF16)
    parties = [name for name in (p.format(batch=args.batch) for p in order) if f"jax-{name}" not in args.skip]
    if args.parties is not None:
        parties = [name for name in parties if name in args.parties]
    seconds: dict[str, float] = {}

    def compiled(party: str, lowered: Any) -> Any:
        start = time.perf_counter()
        if start - begun > args.seconds:
            raise TimeoutError(f"not begun within {args.seconds:.0f} s")
        done = lowered.compile()
        seconds[party] = time.perf_counter() - start
        return done

    with ThreadPoolExecutor(args.threads) as pool:  # XLA compiles without Python's lock
        futures: dict[str, Future] = {}
        for party in parties:
            with forgiven(f"{args.model} jax {party}"):
                futures[party] = pool.submit(compiled, party, one.lower(party))
    for party, future in futures.items():
        with forgiven(f"{args.model} jax {party}"):
            step = future.result()
            if args.warm:
                print(f"{args.model} jax {party}: compiled, {seconds[party]:.0f} s", file=sys.stderr, flush=True)
                continue
            times, loss = timed(step, one, args.rounds, args.steps)
            plan = step.memory_analysis()
            bytes_ = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
            row = {"method": f"jax-{party}", "m": group_of(party) or args.batch, "seconds": statistics.median(times)}
            row |= {"rounds": times, "peak_bytes": bytes_ - plan.alias_size_in_bytes, "setup_seconds": seconds[party]}
            row |= {"loss": loss, "jax": jax.__version__}
            print(json.dumps(row), flush=True)


@contextmanager
def forgiven(who: str) -> Iterator[None]:
    """One party's failure must not cost the others their run."""
    try:
        yield
    except Exception as error:
        print(f"{who} failed: {type(error).__name__}: {str(error)[:400]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
