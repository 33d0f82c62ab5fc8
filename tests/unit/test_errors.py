"""Lack of memory, in the words of whoever noticed it."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from sam_repro.errors import OutOfMemory, UserError, out_of_memory

LACKING = {
    "torch on a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "the system": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("source", LACKING)
def test_it_is_one_sentence_that_says_what_to_type(source):
    found = out_of_memory(LACKING[source])
    assert isinstance(found, OutOfMemory) and found.code == 4
    assert "train.chunk=N" in str(found) and "\n" not in str(found)
    assert str(found).startswith("the GPU") == (source in ("torch on a GPU", "cuBLAS", "cuDNN"))
    assert ("20.00 GiB" in str(found)) == (source == "torch on a GPU")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: np.empty(2**55)])
def test_real_allocators(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate()
    found = out_of_memory(error.value)
    assert found is not None and "this machine has no memory left for another " in str(found)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape"), UserError("of memory"), OSError(errno.ENOENT, "no"), ValueError("x")]
)
def test_other_errors_are_none(error):
    assert out_of_memory(error) is None
