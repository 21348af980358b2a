"""ECG encoders aligned with language models by optimal transport."""
