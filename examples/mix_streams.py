"""Manifold-constrained hyper-connections: residual streams are mixed by doubly stochastic matrices.

    python examples/mix_streams.py

Through 20 layers, mixing by free matrices blows up; doubly stochastic ones keep the mean of the streams.
"""

import torch

from ecgot.compat.hyper_connections import sinkhorn_knopp

LAYERS, TOKENS, STREAMS, WIDTH = 20, 256, 4, 16


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, TOKENS, STREAMS, STREAMS, generator=generator).requires_grad_()
    streams = torch.randn(TOKENS, STREAMS, WIDTH, generator=generator)
    mixing = sinkhorn_knopp(logits)  # all layers and tokens in one call; on a GPU, one launch
    free, kept = streams, streams
    for layer in range(LAYERS):
        free = logits[layer].detach().exp() @ free
        kept = mixing[layer] @ kept
    print(f"rows sum to 1 within {(mixing.sum(3) - 1).abs().max().item():.0e}")
    print(f"columns sum to 1 within {(mixing.sum(2) - 1).abs().max().item():.0e}")
    largest = [each.abs().max().item() for each in (streams, free, kept)]
    print(f"largest stream {largest[0]:.2f}; by free matrices {largest[1]:.1e}, by ours {largest[2]:.2f}")
    drift = (kept.mean(1) - streams.mean(1)).abs().max().item()
    print(f"the mean of the streams moved by {drift:.0e}")
    kept.square().sum().backward()
    print(f"the gradient of all {LAYERS * TOKENS} matrices is finite: {bool(logits.grad.isfinite().all())}")


if __name__ == "__main__":
    main()
