"""The processes of a run: the ranks, and the heartbeat by which they watch each other."""
