"""Running what tables and plans ask for: plan, queue, workers, status."""
