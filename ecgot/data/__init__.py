"""From files to arrays in mV: formats, leads, quality, measurements, PTB-XL, cache, synthetic data."""
