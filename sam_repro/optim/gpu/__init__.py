"""The two-pass step on a GPU: fused passes, CUDA graphs, all groups at once."""
