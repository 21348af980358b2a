"""ECG encoders, text encoders, alignment and report generation."""

from ecgot.models.encoders import encoder

__all__ = ["encoder"]
