"""Data: images to train on, and requests to sample."""
