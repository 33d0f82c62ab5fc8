"""Shared pieces of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded_and_without_a_trace() -> Iterator[None]:
    """Every test starts from the same seed, and leaves torch's global switches as it found them."""
    torch.manual_seed(0)
    before = switches()
    yield
    assert switches() == before


def switches() -> tuple:
    attention = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    return *attention, torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.get_default_dtype()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
