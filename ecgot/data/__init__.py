"""From WFDB files to arrays: records, PTB-XL's tables, signal cache, synthetic data."""
