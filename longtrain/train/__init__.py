"""Assembly, the training loop, checkpoints and tracking."""
