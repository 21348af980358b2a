"""What a trained run is worth: zero-shot detection, report metrics, a linear probe, and their controls."""
