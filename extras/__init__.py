"""What is useful, and not needed to prepare, train, sample and evaluate."""
