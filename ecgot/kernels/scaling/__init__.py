"""Many small square matrices made doubly stochastic by a fixed number of row and column normalisations."""
