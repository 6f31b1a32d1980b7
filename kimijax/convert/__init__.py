"""Foreign checkpoints: their files, their names and their quantised formats."""
