"""torchcfm's OTPlanSampler: flow matching between pairs of a plan has shorter ways than between random ones.

python examples/match_flows.py
"""

import numpy as np
import torch

from ecgot.compat.torchcfm import OTPlanSampler


def moons(count: int, generator: torch.Generator) -> torch.Tensor:
    """Points [count, 2] on two half circles."""
    angle = torch.pi * torch.rand(count, generator=generator)
    side = (torch.rand(count, generator=generator) < 0.5).float()
    x = angle.cos() + side - 0.5
    y = torch.where(side > 0, 0.25 - angle.sin(), angle.sin() - 0.25)
    return 2 * torch.stack([x, y], 1)


def main() -> None:
    np.random.seed(0)  # noqa: NPY002  the sampler draws from NumPy's global generator, as torchcfm's does
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(256, 2, generator=generator), moons(256, generator)
    print(f"random pairs: mean squared way {(x1 - x0).square().sum(1).mean().item():.3f}")
    for method in ("exact", "sinkhorn"):
        sampler = OTPlanSampler(method, reg=0.05)
        sampler.max_iter = 5000  # an attribute of ours: so small a reg takes 1300 iterations
        start, end = sampler.sample_plan(x0, x1)
        way = (end - start).square().sum(1).mean().item()
        # Conditional flow matching regresses this velocity at a random time.
        time = torch.rand(len(start), 1, generator=generator)
        position, velocity = (1 - time) * start + time * end, end - start
        print(
            f"{method} pairs: mean squared way {way:.3f}, {tuple(position.shape)} positions with velocities"
        )
        assert velocity.shape == position.shape


if __name__ == "__main__":
    main()
