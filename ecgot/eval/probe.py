"""The linear probe: a logistic regression on the frozen encoder's pooled output."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


def linear_probe(features: np.ndarray, truth: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Class probabilities [m, C] for ``targets``.

    Args:
        features: [n, D], pooled encoder output of the training records.
        truth: [n, C], bool. A class that is never or always present scores 0 for every target.
        targets: [m, D].
    """
    scaler = StandardScaler().fit(features)
    features, targets = scaler.transform(features), scaler.transform(targets)
    scores = np.zeros((len(targets), truth.shape[1]))
    for column in range(truth.shape[1]):
        if truth[:, column].any() and not truth[:, column].all():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # close to the optimum is enough
                model = LogisticRegression(C=0.01, max_iter=200).fit(features, truth[:, column])
            scores[:, column] = model.predict_proba(targets)[:, 1]
    return scores
