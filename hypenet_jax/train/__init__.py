"""One training loop for every stage: optimizer, losses, checkpoints, metrics."""
