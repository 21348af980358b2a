"""A reading as a self-contained page, a picture or a PDF, and the index of a folder. Imports no torch."""
