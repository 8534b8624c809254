"""The training loop, checkpoints, and where a job's trained model comes from."""
