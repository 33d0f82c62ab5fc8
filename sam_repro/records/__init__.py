"""What a run leaves on disk, readable without torch: its row, its log, its lock, why it failed."""
