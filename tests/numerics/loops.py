"""Small nets and the three forms of a training step that drop-in optimizers are used in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def net(dropout: float = 0.0, norm: bool = False) -> nn.Module:
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def batch(n: int = 12):
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))


def two_calls(opt, loss):
    loss().backward()
    opt.first_step(zero_grad=True)
    loss().backward()
    opt.second_step(zero_grad=True)


def closure_form(opt, loss):
    def closure():
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return opt.step(closure)


def block_form(opt, loss):
    loss().backward()
    with opt.robust_pass():
        loss().backward()
    opt.step()
    opt.zero_grad()


FORMS = [two_calls, closure_form, block_form]


def problem(build, model=None):
    model = net() if model is None else model
    x, y = batch()
    return model, build(model), lambda: F.cross_entropy(model(x), y)
