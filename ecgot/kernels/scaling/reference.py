"""Row and column normalisation as it is written in the paper: the oracle of the tests, in torch alone."""

from torch import Tensor


def doubly_stochastic(logits: Tensor, iterations: int, rows_first: bool = False) -> Tensor:
    """exp(logits) [..., n, n], its columns and then its rows divided by their sums, ``iterations`` times.

    In the logarithm throughout, and differentiated by autograd through every step. Give it fp64.
    """
    first, second = (-1, -2) if rows_first else (-2, -1)
    for _ in range(iterations):
        logits = logits - logits.logsumexp(first, keepdim=True)
        logits = logits - logits.logsumexp(second, keepdim=True)
    return logits.exp()
