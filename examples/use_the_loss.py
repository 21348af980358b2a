"""The transport loss in a training loop: learn the map that takes one point cloud to another.

    python examples/use_the_loss.py

A batch of clouds is rotated, stretched and shifted by an unknown affine map, and its points are shuffled, so
that nobody knows which point became which. The Sinkhorn divergence compares the clouds as sets, and its
gradient finds the map.
"""

import torch

import ecgot

CLOUDS, POINTS, STEPS = 8, 48, 100
TRUE_MAP = torch.tensor([[1.2, -0.5], [0.4, 0.9]])
TRUE_SHIFT = torch.tensor([0.5, -0.3])


def clouds(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, N, 2], and the same points mapped and in another order, y [B, N, 2]."""
    x = torch.randn(CLOUDS, POINTS, 2, generator=generator)
    shuffled = torch.rand(CLOUDS, POINTS, generator=generator).argsort(1)
    moved = x @ TRUE_MAP.T + TRUE_SHIFT
    return x, moved.gather(1, shuffled[:, :, None].expand(-1, -1, 2))


def train(steps: int = STEPS) -> tuple[torch.nn.Linear, list[float]]:
    """The fitted map and the loss at each step."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.zero_()
    # A cloud's transport to itself is slow to the last digits; for a gradient, marginals within 1e-3 will do.
    loss_of = ecgot.SinkhornLoss(eps=0.2, debias=True, scaling=0.7, tol=1e-3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        x, y = clouds(generator)
        loss = loss_of(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return layer, losses


def main() -> None:
    layer, losses = train()
    for step in range(0, STEPS, 25):
        print(f"step {step:3d}: divergence {losses[step]:.4f}")
    print(f"step {STEPS - 1:3d}: divergence {losses[-1]:.4f}")
    off = max((layer.weight - TRUE_MAP).abs().max().item(), (layer.bias - TRUE_SHIFT).abs().max().item())
    print(f"the map found is within {off:.1e} of the one that was looked for")

    # The output says whether each problem was solved, and holds the plan.
    x, y = clouds(torch.Generator().manual_seed(1))
    out = ecgot.sinkhorn(layer(x), y, eps=0.2, scaling=0.7, max_iter=5000)
    print(f"{int(out.converged.sum())} of {CLOUDS} problems converged by {out.backend}")
    print(f"marginal error at most {out.marginal_error.max().item():.1e}, plan {tuple(out.plan().shape)}")


if __name__ == "__main__":
    main()
