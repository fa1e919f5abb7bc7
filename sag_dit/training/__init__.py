"""Training: objectives and the LightningModule."""
