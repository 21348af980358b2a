"""What makes things out of this repository."""
