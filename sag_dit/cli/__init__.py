"""What the root scripts call. Hydra is imported here and nowhere else."""
