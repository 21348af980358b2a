"""The kernels between the convolutions, against fp64. Run with TRITON_INTERPRET=1 or on a GPU."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.kernels import BatchNorm, LazyActivation, conv1d_norm, dispatch, join, materialize
from ecgot.kernels.conv.conv1d_norm import conv1d_norm_beside

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = dispatch.INTERPRETED or DEVICE == "cuda"
on_kernels = pytest.mark.skipif(not TRITON, reason="the kernels run in the interpreter or on a GPU")
CHANNELS, TILES = 11, 300  # more tiles than a program takes at a time


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples() -> list[Tensor]:
    """Of tiles with 0 to 6 samples, whose channels have means far from 0 and from tile to tile."""
    return [
        1000 + 5 * draw(1, CHANNELS, seed=tile) + draw(tile % 7, CHANNELS, seed=tile + TILES)
        for tile in range(TILES)
    ]


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    size = expected.abs().max().item()
    torch.testing.assert_close(got.cpu().double(), expected, atol=tolerance * size, rtol=0)


@on_kernels
def test_tiles_merge_into_what_all_their_samples_give(poisoned_empty: None) -> None:
    from ecgot.kernels.conv.triton_statistics import TileStatistics, moments, normalise

    tiles = samples()
    means = torch.stack([tile.mean(0) if len(tile) else torch.zeros(CHANNELS).double() for tile in tiles])
    m2 = torch.stack([(tile - mean).square().sum(0) for tile, mean in zip(tiles, means, strict=True)])
    counts = torch.tensor([float(len(tile)) for tile in tiles])
    given = TileStatistics(*(t.to(DEVICE, torch.float32) for t in (counts, means, m2)))
    everything = torch.cat(tiles)
    mean, var = everything.mean(0), everything.var(0, correction=0)
    close(moments(given)[0], mean, 1e-6)
    close(moments(given)[1], var, 1e-4)
    module = nn.BatchNorm1d(CHANNELS, eps=0.1, momentum=0.3, dtype=torch.float64)
    module.weight.data, module.bias.data = draw(CHANNELS, seed=1), draw(CHANNELS, seed=2)
    norm = BatchNorm(
        *(t.detach().float().to(DEVICE) for t in (module.weight, module.bias)),
        torch.zeros(CHANNELS, device=DEVICE),
        torch.ones(CHANNELS, device=DEVICE, dtype=torch.bfloat16),  # not what the kernel writes
        eps=0.1,
        momentum=0.3,
        batches=torch.tensor(4, device=DEVICE),
    )
    vectors = normalise(given, norm)
    module(everything)
    rstd = (var + 0.1).rsqrt()
    ones = torch.full((CHANNELS,), 1 / len(everything)).double()
    for got, expected in zip(vectors, (mean, module.weight * rstd, module.bias, rstd, ones), strict=True):
        close(got, expected.detach(), 1e-4)
    close(norm.running_mean, module.running_mean, 1e-6)
    close(norm.running_var, module.running_var, 1e-2)
    assert norm.batches.item() == 5


@on_kernels
@pytest.mark.parametrize("carried", [True, False])
def test_sums_of_tiles_become_what_the_convolution_before_takes(carried: bool, poisoned_empty: None) -> None:
    """c0 and c1 against autograd through a batch norm in fp64."""
    from ecgot.kernels.conv.triton_statistics import merge_sums

    rows, eps = 2 * TILES, 1e-3
    y, g = (3 + draw(rows, CHANNELS)).requires_grad_(), draw(rows, CHANNELS, seed=1)
    gamma, beta = (draw(CHANNELS, seed=seed).requires_grad_() for seed in (2, 3))
    mean, var = y.mean(0), y.var(0, correction=0)
    rstd = (var + eps).rsqrt()
    h = (y - mean) * rstd * gamma + beta
    grad_y, grad_gamma, grad_beta = torch.autograd.grad(h, (y, gamma, beta), g)
    with torch.no_grad():
        parts = torch.stack([g, g * (y - mean)]).unflatten(1, (TILES, 2)).sum(2).float().to(DEVICE)
        table = torch.stack([mean, gamma * rstd, beta, rstd, torch.full_like(mean, 1 / rows)])
        vectors = table.float().to(DEVICE)
        x = LazyActivation(y, *vectors[:3], vectors=vectors if carried else None)
        merged = merge_sums(parts, x)
        sums = parts.double().sum(1).cpu()
        if not carried:
            close(merged, sums, 1e-6)
            return
        c0, c1, of_gamma, of_beta, rest = merged.cpu().double()
        close(g * table[1] + c0 + c1 * (y - mean), grad_y, 1e-5)
        close(of_gamma, grad_gamma, 1e-5)
        close(of_beta, grad_beta, 1e-5)
        assert not rest.any()
        *_, in_torch = x.gradients(None, *sums.float().to(DEVICE))  # where torch makes a pass
        torch.testing.assert_close(in_torch, merged, atol=1e-5, rtol=1e-5)


@on_kernels
@pytest.mark.parametrize("parts", [1, 5, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_of_a_weights_gradient_are_added_in_the_weights_layout(
    parts: int, dtype: torch.dtype, poisoned_empty: None
) -> None:
    from ecgot.kernels.conv.triton_statistics import sum_parts

    partial = draw(parts, 3, 5, 14)
    like = torch.empty(14, 3, 5).permute(0, 2, 1).to(DEVICE, dtype)  # channels innermost
    grad = sum_parts(partial.float().to(DEVICE), like)
    assert (grad.dtype, grad.stride()) == (dtype, like.stride())
    close(grad, partial.sum(0).permute(2, 1, 0), 4e-3 if dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_shortcut_beside_a_convolution(masked: bool, stride: int) -> None:
    """Its gradient and the convolution's add up; against torch in fp64."""
    lengths = torch.tensor([40, 23] if masked else [40, 40])
    inside = (torch.arange(40) < lengths[:, None])[:, :, None]
    given = {"x": draw(2, 40, 6), "w": draw(5, 6, 3, seed=1), "v": draw(5, 6, 1, seed=2)}
    gamma, beta = 1 + 0.1 * draw(5, seed=3), draw(5, seed=4)
    leaves = {name: t.clone().float().to(DEVICE).requires_grad_() for name, t in given.items()}
    truth = {name: t.clone().requires_grad_() for name, t in given.items()}
    norm = BatchNorm(
        gamma.float().to(DEVICE), beta.float().to(DEVICE), batches=torch.tensor(0, device=DEVICE)
    )
    mask = lengths.int().to(DEVICE) if masked else None
    # Not a leaf: what a network's block reads is another layer's output.
    x = LazyActivation(leaves["x"] * 2, lengths=mask)
    y, again = conv1d_norm_beside(x, leaves["w"], norm, padding=1, stride=stride, activation="silu")
    z = join(conv1d_norm(again, leaves["v"], norm, stride=stride), y, "silu").values
    assert norm.batches.item() == 2
    kept = (lengths + stride - 1) // stride
    rows = [z[b, :n] for b, n in enumerate(kept)]
    records = [truth["x"][b, :n].T * 2 for b, n in enumerate(lengths)]

    def layer(weight: Tensor, padding: int) -> Tensor:
        ys = torch.cat([F.conv1d(r, weight, stride=stride, padding=padding) for r in records], 1)
        return F.batch_norm(ys.T, None, None, gamma, beta, training=True)

    expected = F.silu(F.silu(layer(truth["w"], 1)) + layer(truth["v"], 0))
    close(torch.cat(rows).detach(), expected.detach(), 1e-5)
    pull = draw(*expected.shape, seed=5)
    found = torch.autograd.grad((torch.cat(rows) * pull.float().to(DEVICE)).sum(), list(leaves.values()))
    wanted = torch.autograd.grad((expected * pull).sum(), list(truth.values()))
    for got, true in zip(found, wanted, strict=True):
        close(got, true, 1e-4)
    assert not found[0][~inside.expand_as(given["x"]).to(DEVICE)].any()


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autocast_rounds_weights_and_keeps_their_gradients_wide(k: int, backend: str) -> None:
    x, w = draw(2, 30, 16).float().to(DEVICE), draw(8, 16, k, seed=1).float().to(DEVICE).requires_grad_()
    norm = BatchNorm(torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE))
    pull = draw(2, 30 - k + 1, 8, seed=2).float().to(DEVICE)

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = materialize(conv1d_norm(LazyActivation(x), w, norm, activation="silu", backend=backend)).values
        return y, *torch.autograd.grad((y.float() * pull).sum(), w)

    with torch.autocast(DEVICE, torch.bfloat16):
        y, grad = run(x, w)
    rounded = w.detach().bfloat16()
    expected, expected_grad = run(x.bfloat16(), rounded.requires_grad_())
    assert (y.dtype, grad.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, expected)
    torch.testing.assert_close(grad, expected_grad.float(), atol=2**-8 * grad.abs().max().item(), rtol=0)


@on_kernels
def test_nan_of_one_channel_stays_its_own() -> None:
    x, w = draw(2, 30, 4).float().to(DEVICE), torch.ones(4, 1, 1, device=DEVICE, requires_grad=True)
    x[1, 3, 2] = math.nan
    gamma = torch.ones(4, device=DEVICE, requires_grad=True)
    running = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    norm = BatchNorm(gamma, torch.zeros_like(gamma), *running)
    y = materialize(conv1d_norm(LazyActivation(x), w, norm, groups=4))
    (grad,) = torch.autograd.grad(y.values[..., [0, 1, 3]].square().sum(), gamma)
    for vector in (*running, y.values.sum((0, 1))):
        assert vector.isnan().tolist() == [False, False, True, False]
    assert grad[[0, 1, 3]].isfinite().all()
