"""From WFDB files to arrays: records, PTB-XL's tables, report text, signal cache, synthetic data."""
