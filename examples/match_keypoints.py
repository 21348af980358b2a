"""SuperGlue's matching with a dustbin: points seen in two pictures are paired, the others left over.

python examples/match_keypoints.py
"""

import torch

from ecgot.compat.superglue import log_optimal_transport


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    shared, only_first, only_second, width = 30, 10, 15, 32
    seen = torch.randn(shared, width, generator=generator)
    first = torch.cat([seen, torch.randn(only_first, width, generator=generator)])
    noisy = seen + 0.3 * torch.randn(seen.shape, generator=generator)
    second = torch.cat([noisy, torch.randn(only_second, width, generator=generator)])
    order = torch.randperm(len(second), generator=generator)

    scores = (2 * first @ second[order].T / width**0.5)[None].requires_grad_()
    dustbin = torch.tensor(2.0, requires_grad=True)
    log_plan = log_optimal_transport(scores, dustbin, iters=100)
    matches = log_plan[0, :-1].argmax(1)  # the last column is the dustbin
    wanted = order.argsort()[:shared]
    right = int((matches[:shared] == wanted).sum())
    left_over = int((matches[shared:] == len(second)).sum())
    print(f"{right} of {shared} points found their partner, {left_over} of {only_first} others the dustbin")

    # The loss of the paper: minus the logarithms of what should be matched.
    loss = -log_plan[0, torch.arange(shared), wanted].mean()
    loss.backward()
    print(f"loss {loss.item():.4f}, its gradient in the dustbin's score {dustbin.grad.item():.4f}")


if __name__ == "__main__":
    main()
