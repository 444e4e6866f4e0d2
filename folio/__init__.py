"""What the scripts share: settings, data, optimizers, checkpoints, generation."""
