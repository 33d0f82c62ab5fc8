"""What the sharpness monitor does where the GPU has no memory for its batches."""

from __future__ import annotations

import pytest
import torch

from sam_repro.optim.memory import fitting

WRAPPED = RuntimeError("failed in the TorchScript interpreter.\nRuntimeError: CUDA out of memory.")


def batches(*sizes: int):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(torch.arange(a, a + n), torch.arange(a, a + n)) for a, n in zip(starts, sizes, strict=True)]


def room_for(images: int, error: RuntimeError):
    def attempt(batch):
        if len(batch[0]) > images:
            raise error

    return attempt


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), WRAPPED])
def test_batches_are_halved_until_one_fits(error):
    found = fitting(batches(100, 100, 37), room_for(30, error))
    assert [len(b[0]) for b in found] == [25] * 9 + [12]
    for part in zip(*found, strict=True):
        assert torch.cat(part).tolist() == list(range(237))


def test_batches_that_fit_stay():
    whole = batches(100, 37)
    assert fitting(whole, room_for(100, WRAPPED)) is whole
    assert fitting([], room_for(0, WRAPPED)) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("another")])
def test_what_cannot_be_helped_is_raised(error):
    with pytest.raises(type(error)):
        fitting(batches(4), room_for(0, error))
