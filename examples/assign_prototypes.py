"""SwAV's and DINOv2's assignment of samples to prototypes, which keeps every prototype in use.

python examples/assign_prototypes.py
"""

import torch

from ecgot.compat.sinkhorn_knopp import distributed_sinkhorn, sinkhorn_knopp_teacher


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, prototypes, width = 512, 8, 64
    # All samples look alike, as they do early in training: the best prototype is nearly always the same one.
    features = torch.randn(1, width, generator=generator) + 0.5 * torch.randn(
        samples, width, generator=generator
    )
    features = torch.nn.functional.normalize(features, dim=1)
    directions = torch.nn.functional.normalize(torch.randn(prototypes, width, generator=generator), dim=1)
    scores = features @ directions.T
    used = scores.argmax(1).bincount(minlength=prototypes)
    print(f"by the best score:      {used.tolist()} samples a prototype")
    codes = distributed_sinkhorn(scores, sinkhorn_iterations=3, epsilon=0.05)
    print(f"SwAV, soft assignments: {codes.sum(0).round().int().tolist()}")
    targets = sinkhorn_knopp_teacher(scores, teacher_temp=0.07, n_iterations=20)
    print(f"DINOv2, 20 iterations:  {targets.sum(0).round().int().tolist()}")
    print(f"each sample is shared out whole, to {(codes.sum(1) - 1).abs().max().item():.0e}")


if __name__ == "__main__":
    main()
