"""What must not differ between the two passes of somebody else's loop: buffers and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Passes:
    """What a model carries from pass to pass: buffers and random numbers. Does nothing for no model.

    A hook in front of the model's forward notes the generators' states of every clean call, and sets them again, in
    order, for the robust calls; evaluation does not count. The generators then go on from where the clean pass left
    them.
    """

    def __init__(self, model: nn.Module | None):
        self.model, self.robust = model, False
        self.clean: list[list[Tensor]] = []
        if model is not None:
            model.register_forward_pre_hook(self._before_forward)

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
        noted, state = len(self.clean), self.random_state()
        buffers = self.copies()
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            if self.model is not None:
                self.set_random_state(state)
            del self.clean[noted:]

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Each buffer with what it holds now."""
        return [] if self.model is None else [(b, b.clone()) for b in self.model.buffers()]

    def random_state(self) -> list[Tensor]:
        """The states of the host's generator and the current GPU's."""
        gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
        return [torch.get_rng_state(), *gpu]

    def set_random_state(self, states: list[Tensor]) -> None:
        """Inverse of random_state."""
        torch.set_rng_state(states[0])
        for gpu in states[1:]:
            torch.cuda.set_rng_state(gpu)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        if not self.robust:
            self.clean.append(self.random_state())
        elif self.replay:
            self.set_random_state(self.replay.pop(0))
