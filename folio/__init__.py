"""What the scripts share: settings, data, optimizers, checkpoints, fast generation."""
