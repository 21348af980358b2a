"""Encoder of ECGs, encoder of text, their alignment, and the report writer."""
