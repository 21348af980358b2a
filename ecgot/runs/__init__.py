"""What training and reading share: a run's settings, folder, records and trained models."""
