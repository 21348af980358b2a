"""A program written against POT, with one import changed: colours of one picture are carried to another.

    python examples/instead_of_pot.py

Arrays of NumPy come back as arrays of NumPy. The last lines take the same points as tensors, for a gradient.
"""

import numpy as np
import torch

import ecgot.compat.pot as ot  # was: import ot


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [300, 3] and [400, 3] of a blueish and a reddish picture."""
    draw = np.random.default_rng(0)
    blue, red = np.array([0.2, 0.4, 0.7]), np.array([0.8, 0.4, 0.2])
    return blue + 0.1 * draw.standard_normal((300, 3)), red + 0.15 * draw.standard_normal((400, 3))


def main() -> None:
    x, y = pictures()
    a, b = ot.unif(len(x)), ot.unif(len(y))
    cost = ot.dist(x, y)
    plan = ot.sinkhorn(a, b, cost, reg=0.05)
    moved = plan @ y / plan.sum(1, keepdims=True)
    print(f"mean colour {x.mean(0).round(2)} became {moved.mean(0).round(2)}, wanted {y.mean(0).round(2)}")
    print(f"marginals are met to {abs(plan.sum(0) - b).sum():.0e}")
    print(f"sinkhorn2: {ot.sinkhorn2(a, b, cost, 0.05):.6f}, the plan's own cost: {(plan * cost).sum():.6f}")

    result = ot.solve_sample(x, y, reg=0.05, unbalanced=1.0)
    print(f"unbalanced: {result.plan.sum():.4f} of the mass moved, at a cost of {result.value_linear:.4f}")

    points = torch.tensor(x, requires_grad=True)
    result = ot.solve_sample(points, torch.tensor(y), reg=0.05, reg_type="entropy")
    result.value.backward()
    # With squared distances, each point is drawn to where its mass goes.
    drawn = points.detach() - len(x) / 2 * points.grad
    print(f"the gradient points to the moved colours, off by {np.abs(drawn.numpy() - moved).max():.0e}")


if __name__ == "__main__":
    main()
