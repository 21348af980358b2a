"""Gumbel-Sinkhorn: numbers are sorted by a permutation that gradients can learn.

    python examples/learn_to_sort.py

As in Mena et al. 2018: a small network gives each number a score for each rank, and the Sinkhorn operator
turns the scores into a matrix that is nearly a permutation.
"""

import torch

from ecgot.compat.gumbel_sinkhorn import gumbel_sinkhorn, sinkhorn

LENGTH, STEPS = 5, 150


def main() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.ReLU(), torch.nn.Linear(32, LENGTH))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(STEPS):
        numbers = torch.rand(64, LENGTH)
        matrices, _ = gumbel_sinkhorn(net(numbers[:, :, None]), temp=1.0, noise_factor=0.5, n_iters=10)
        ranked = (matrices.mT @ numbers[:, :, None])[:, :, 0]
        loss = (ranked - numbers.sort(1).values).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:3d}: loss {loss.item():.5f}")
    numbers = torch.rand(1000, LENGTH)
    ranks = sinkhorn(net(numbers[:, :, None]) / 0.05, n_iters=100).argmax(1)
    ranked = numbers.gather(1, ranks)
    right = (ranked.diff(dim=1) >= 0).float().mean().item()
    print(f"{100 * right:.1f} % of neighbours are in order")


if __name__ == "__main__":
    main()
