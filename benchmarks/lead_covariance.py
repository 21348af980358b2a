"""The covariance of the independent leads over training folds, from which missing leads are estimated.

python -m benchmarks.lead_covariance DATA > ecgot/data/lead_covariance.csv
"""

import csv
import sys

import numpy as np

from ecgot.data.baseline import HIGHPASS_HZ
from ecgot.data.dataset import load_dataset
from ecgot.data.leads import INDEPENDENT_LEADS

TRAINING_FOLDS = range(1, 9)
RECORDS = 512  # that are looked at at once


def main(root: str) -> None:
    """Print the covariance as CSV, in mV^2."""
    dataset = load_dataset(root, folds=TRAINING_FOLDS, leads=INDEPENDENT_LEADS, highpass_hz=HIGHPASS_HZ)
    total, samples = np.zeros((len(INDEPENDENT_LEADS),) * 2), 0
    for start in range(0, len(dataset), RECORDS):
        signals = dataset.waveforms_mv(np.arange(start, min(start + RECORDS, len(dataset)))).astype(
            np.float64
        )
        total += np.einsum("bit,bjt->ij", signals, signals, optimize=True)
        samples += signals.shape[0] * signals.shape[2]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(INDEPENDENT_LEADS)
    writer.writerows([[f"{value:.6f}" for value in row] for row in total / samples])


if __name__ == "__main__":
    main(sys.argv[1])
