"""Writing data sets as .beton files."""

from sam_repro.data.write.dataset import encode, write_dataset

__all__ = ["encode", "write_dataset"]
