"""The same methods as torch.optim.Optimizer, for other people's loops."""
