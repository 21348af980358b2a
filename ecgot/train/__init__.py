"""The two training stages and their configuration."""
