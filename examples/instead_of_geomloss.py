"""A program written against geomloss, with one import changed: points flow down a divergence.

python examples/instead_of_geomloss.py
"""

import torch

from ecgot.compat.geomloss import SamplesLoss  # was: from geomloss import SamplesLoss


def flow(steps: int = 20) -> list[float]:
    """The loss at each step, while a ring of points flows onto two clusters."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(200) * (2 * torch.pi / 200)
    x = torch.stack([angle.cos(), angle.sin()], 1).requires_grad_()
    centres = torch.tensor([[0.8, 0.8], [-0.8, 0.2]]).repeat(75, 1)
    y = centres + 0.1 * torch.randn(150, 2, generator=generator)
    loss = SamplesLoss("sinkhorn", p=2, blur=0.1)
    losses = []
    for _ in range(steps):
        value = loss(x, y)
        (gradient,) = torch.autograd.grad(value, x)
        # Of a mean over points: times their number it is how far each has to go.
        x = (x - 0.5 * len(x) * gradient).detach().requires_grad_()
        losses.append(value.item())
    return losses


def main() -> None:
    losses = flow()
    for step in range(0, len(losses), 5):
        print(f"step {step:2d}: loss {losses[step]:.5f}")
    print(f"step {len(losses) - 1:2d}: loss {losses[-1]:.5f}, {losses[-1] / losses[0]:.1e} of the first")


if __name__ == "__main__":
    main()
