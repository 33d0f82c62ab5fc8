"""What must not differ between the two passes of somebody else's loop: buffers and random numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ForwardHook:
    """In front of a model's forward: tells the Passes that own it, as long as there are any.

    A copy of the model, deep or pickled, has a hook that does nothing, unless its optimizer is copied with it.
    """

    def __init__(self):
        self.owner: Callable[[], Passes | None] = lambda: None  # a weak reference

    @torch._disable_dynamo  # a compiled model stays one graph, as torch's own optimizers do it
    def __call__(self, module: nn.Module, args: Any) -> None:
        """As torch calls it, before each forward pass."""
        passes = self.owner()
        if passes is not None:
            passes.before_forward(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHook, ()


class Passes:
    """What a model carries from pass to pass: buffers and random numbers. Does nothing for no model.

    A hook in front of the model's forward notes the generators' states of every clean call, and sets them again, in
    order, for the robust calls; evaluation does not count, nor do calls at weights that have changed since (another
    optimizer's steps). The generators then go on from where the clean pass left them.

    Args:
        model: the module that the loop calls, or None.
        base: the optimizer whose parameters these passes are for.
    """

    def __init__(self, model: nn.Module | None, base: torch.optim.Optimizer):
        self.model, self.base, self.robust = model, base, False
        self.clean: list[list[Tensor]] = []
        self.version = 0
        if model is not None:
            self.hook = ForwardHook()
            self.handle = model.register_forward_pre_hook(self.hook)
        self._own_hook()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)  # the model's copy holds the copy of the hook
        self._own_hook()

    def enter_robust(self) -> None:
        """The clean pass is over."""
        self.robust, self.after, self.replay = True, self.random_state(), list(self.clean)
        self.buffers = self.copies()

    def leave_robust(self) -> None:
        """Buffers and generators as the clean pass left them."""
        for buffer, clean in self.buffers:
            buffer.copy_(clean)
        if len(self.replay) < len(self.clean):
            self.set_random_state(self.after)
        self.robust, self.buffers, self.clean = False, [], []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs in the block belongs to neither pass, and leaves no trace."""
        clean, version, state = list(self.clean), self.version, self.random_state()
        buffers = self.copies()
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            if self.model is not None:
                self.set_random_state(state)
            self.clean, self.version = clean, version

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Each buffer with what it holds now."""
        return [] if self.model is None else [(b, b.clone()) for b in self.model.buffers()]

    def random_state(self) -> list[Tensor]:
        """The states of the host's generator and of those of the GPUs that hold parameters."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self._gpus())]

    def set_random_state(self, states: list[Tensor]) -> None:
        """Inverse of random_state."""
        torch.set_rng_state(states[0])
        for gpu, state in zip(self._gpus(), states[1:], strict=True):
            torch.cuda.set_rng_state(state, gpu)

    def before_forward(self, module: nn.Module) -> None:
        """A call of the model is about to draw random numbers."""
        if not module.training or not torch.is_grad_enabled():
            return
        if self.robust:
            if self.replay:
                self.set_random_state(self.replay.pop(0))
            return
        # All calls of a clean pass see the same weights. What was noted at others was for a step that never came.
        version = sum(p._version for p in self._parameters())
        if version != self.version:
            self.clean, self.version = [], version
        self.clean.append(self.random_state())

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"]]

    def _gpus(self) -> list[torch.device]:
        return list(dict.fromkeys(p.device for p in self._parameters() if p.is_cuda))

    def _own_hook(self) -> None:
        if self.model is not None:
            self.hook.owner = weakref.ref(self)
            weakref.finalize(self, self.handle.remove).atexit = False
