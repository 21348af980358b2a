"""What training and inference share: a run's settings, folder, records and trained models."""
