"""Data sets and their batches. It imports nothing: `sam-repro write` and every `--help` do without torch."""
