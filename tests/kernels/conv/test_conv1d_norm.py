"""Convolutions fused with batch norm, against torch's modules in fp64, record by record."""

import itertools
import math
import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.kernels import (
    BatchNorm,
    LazyActivation,
    conv1d_norm,
    dispatch,
    join,
    materialize,
    max_pool1d,
    mean_pool1d,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {None: lambda y: y, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}


class Weights(nn.Module):
    """Of a small network with everything that residual networks have; widths are multiples of nothing."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        shapes = {
            "stem": (20, 12, 7),
            "conv1": (20, 20, 3),
            "conv2": (20, 20, 3),
            "conv3": (37, 20, 3),
            "conv4": (37, 37, 3),
            "shortcut": (37, 20, 1),
            "narrow": (16, 37, 1),
            "grouped": (16, 4, 5),
            "wide": (37, 16, 1),
        }
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
        self.weights = nn.ParameterDict(
            {name: draw(*shape) / math.sqrt(math.prod(shape[1:])) for name, shape in shapes.items()}
        )
        self.gammas = nn.ParameterDict({name: 1 + 0.3 * draw(shape[0]) for name, shape in shapes.items()})
        self.betas = nn.ParameterDict({name: 0.3 * draw(shape[0]) for name, shape in shapes.items()})
        for name, shape in shapes.items():
            self.register_buffer(f"mean_{name}", 0.1 * draw(shape[0]))
            self.register_buffer(f"var_{name}", 1 + draw(shape[0]).square())
        self.to(DEVICE, dtype)

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"mean_{name}"), getattr(self, f"var_{name}")


GEOMETRY = {
    "stem": {"stride": 2, "padding": 3},
    "conv1": {"padding": 1},
    "conv2": {"padding": 1},
    "conv3": {"stride": 2, "padding": 1},
    "conv4": {"padding": 2, "dilation": 2},
    "shortcut": {"stride": 2},
    "narrow": {},
    "grouped": {"padding": 2, "groups": 4},
    "wide": {},
}


def fused(w: Weights, x: Tensor, lengths: Tensor | None, activation: str, training: bool) -> LazyActivation:
    def layer(name: str, x: LazyActivation, activation: str | None = None, **options) -> LazyActivation:
        norm = BatchNorm(w.gammas[name], w.betas[name], *w.statistics(name), training=training)
        return conv1d_norm(x, w.weights[name], norm, **GEOMETRY[name], activation=activation, **options)

    y = layer("stem", LazyActivation(x, lengths=lengths), activation)
    y = layer("conv2", layer("conv1", y, activation), activation, residual=y)
    y = max_pool1d(y, 3, 2, 1)
    shortcut = layer("shortcut", y)
    y = layer("conv4", layer("conv3", y, activation), activation, residual=shortcut)
    z = layer("grouped", layer("narrow", y, activation), activation)
    y = layer("wide", z, activation, residual=y, recompute=True)
    y = mean_pool1d(y)
    return max_pool1d(layer("narrow", y, activation), 2, 2, 0)


def plain(w: Weights, records: list[Tensor], activation: str, training: bool) -> list[Tensor]:
    """The same of records [C, T] on their own; only a batch norm's statistics join them."""
    act = ACTIVATIONS[activation]

    def layer(name: str, xs: list[Tensor]) -> list[Tensor]:
        ys = [F.conv1d(x, w.weights[name], **GEOMETRY[name]) for x in xs]
        mean, var = w.statistics(name)
        flat = F.batch_norm(torch.cat(ys, 1).T, mean, var, w.gammas[name], w.betas[name], training, 0.1).T
        return list(flat.split([y.shape[1] for y in ys], 1))

    each = lambda f, *lists: [f(*args) for args in zip(*lists, strict=True)]  # noqa: E731
    add = lambda a, b: act(a + b)  # noqa: E731
    ys = each(act, layer("stem", records))
    ys = each(add, layer("conv2", each(act, layer("conv1", ys))), ys)
    ys = each(lambda y: F.max_pool1d(y[None], 3, 2, 1)[0], ys)
    shortcuts = layer("shortcut", ys)
    ys = each(add, layer("conv4", each(act, layer("conv3", ys))), shortcuts)
    zs = each(act, layer("grouped", each(act, layer("narrow", ys))))
    ys = each(add, layer("wide", zs), ys)
    ys = each(lambda y: F.avg_pool1d(y[None], 2, ceil_mode=True)[0], ys)
    return each(lambda y: F.max_pool1d(act(y)[None], 2, 2)[0], layer("narrow", ys))


# Every pair of activation, training and masked; no path depends on all three.
PAIRWISE = [
    ("relu", True, True),
    ("relu", False, False),
    ("silu", True, False),
    ("silu", False, True),
    ("gelu", True, True),
    ("gelu", False, False),
]
MODES = list(itertools.product(("relu", "silu", "gelu"), (True, False), (True, False)))


@pytest.mark.parametrize(
    ("dtype", "activation", "training", "masked"),
    [(torch.float64, *mode) for mode in MODES]  # in torch, and fast
    + [
        pytest.param(torch.float32, *mode, marks=[] if mode in PAIRWISE else pytest.mark.slow)
        for mode in MODES
    ],
)
def test_network_equals_torch_record_by_record(dtype, activation, training, masked):
    lengths = torch.tensor([66, 123]) if masked else torch.tensor([123, 123])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 123, generator=generator, dtype=torch.float64)
    truth, ours = Weights(), Weights(dtype)
    expected = plain(
        truth, [r[:, :n].to(DEVICE) for r, n in zip(x, lengths, strict=True)], activation, training
    )
    x = (
        torch.where(torch.arange(123) < lengths[:, None, None], x, math.nan)
        .to(DEVICE, dtype)
        .requires_grad_()
    )
    out = fused(ours, x.transpose(1, 2), lengths.int().to(DEVICE) if masked else None, activation, training)
    out = materialize(out)
    rows = [out.values[b, : y.shape[1]].T for b, y in enumerate(expected)]
    if masked:
        assert out.lengths.tolist() == [y.shape[1] for y in expected]
    tolerance = TOLERANCE[dtype]
    for row, y in zip(rows, expected, strict=True):
        torch.testing.assert_close(row.double(), y, atol=tolerance, rtol=tolerance)
    pulls = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(DEVICE) for y in expected]
    sum((row * cotangent.to(dtype)).sum() for row, cotangent in zip(rows, pulls, strict=True)).backward()
    sum((y * cotangent).sum() for y, cotangent in zip(expected, pulls, strict=True)).backward()
    for (name, got), wanted in zip(ours.named_parameters(), truth.parameters(), strict=True):
        size = wanted.grad.abs().max().item()
        torch.testing.assert_close(
            got.grad.double(),
            wanted.grad,
            atol=20 * tolerance * size,
            rtol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for (name, got), wanted in zip(ours.named_buffers(), truth.buffers(), strict=True):
        torch.testing.assert_close(
            got.double(), wanted, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not x.grad.isnan().any()
    assert (x.grad.transpose(1, 2)[0, lengths[0] :] == 0).all()


def test_a_large_mean_costs_no_accuracy():
    """Statistics are merged and gradients formed around the mean: sums of squares would lose all digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 300, 8, generator=generator, dtype=torch.float64)
    w = torch.randn(6, 8, 1, generator=generator, dtype=torch.float64)
    x[..., 0] += 3000
    w[:, 0, 0] = 1
    results = []
    for dtype in (torch.float32, torch.float64):
        x_, w_ = x.to(DEVICE, dtype).requires_grad_(), w.to(DEVICE, dtype).requires_grad_()
        gamma = torch.ones(6, device=DEVICE, dtype=dtype, requires_grad=True)
        z = conv1d_norm(LazyActivation(x_), w_, BatchNorm(gamma, torch.zeros_like(gamma)), activation="silu")
        cotangent = torch.linspace(-1, 1, 300, device=DEVICE, dtype=dtype)[:, None]
        results.append(
            (
                materialize(z).values,
                *torch.autograd.grad((materialize(z).values * cotangent).sum(), (gamma, x_)),
            )
        )
    for got, wanted in zip(*results, strict=True):
        size = wanted.abs().max().item()
        torch.testing.assert_close(got.double(), wanted, atol=2e-3 * size, rtol=0)


def test_half_precision_errs_no_more_than_torch():
    """A convolution, its norm and ReLU and the next convolution in bf16, against torch's modules in bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 90, 24, generator=generator, dtype=torch.float64).bfloat16().to(DEVICE)
    w1, w2 = (
        (torch.randn(24, 24, 5, generator=generator, dtype=torch.float64) / 11).bfloat16().to(DEVICE)
        for _ in range(2)
    )
    cotangent = torch.randn(4, 90, 24, generator=generator, dtype=torch.float64).bfloat16().to(DEVICE)

    def results(dtype, run):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w1, w2)]
        y = run(*leaves)
        return y, *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))

    def modules(x, w1, w2):
        y = F.conv1d(x.transpose(1, 2), w1, padding=2)
        y = F.conv1d(F.batch_norm(y, None, None, training=True).relu(), w2, padding=2)
        return y.transpose(1, 2)

    def ours(x, w1, w2):
        norm = BatchNorm(torch.ones(24, device=DEVICE), torch.zeros(24, device=DEVICE))
        y = conv1d_norm(LazyActivation(x), w1, norm, padding=2, activation="relu")
        return conv1d_norm(y, w2, norm, padding=2).values

    truth = results(torch.float64, modules)
    for got, torchs, wanted in zip(
        results(torch.bfloat16, ours), results(torch.bfloat16, modules), truth, strict=True
    ):
        error, theirs = ((t.double() - wanted).square().mean().sqrt().item() for t in (got, torchs))
        assert error <= 2 * theirs


def saved_bytes(run) -> int:
    """Of activations that the backward keeps, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 3:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept.append(run())
    return sum(storages.values())


def test_recomputed_outputs_are_not_saved_and_can_be_asked_for_twice():
    x = torch.randn(2, 50, 4, device=DEVICE)
    w = torch.randn(64, 4, 1, device=DEVICE, requires_grad=True)
    residual = torch.randn(2, 50, 64, device=DEVICE, requires_grad=True)
    gamma = torch.ones(64, device=DEVICE, requires_grad=True)

    def run(recompute: bool) -> Tensor:
        z = conv1d_norm(
            *(LazyActivation(x), w, BatchNorm(gamma, torch.zeros_like(gamma))),
            activation="relu",
            residual=LazyActivation(residual),
            recompute=recompute,
        )
        return z.values

    assert saved_bytes(lambda: run(False)) - saved_bytes(lambda: run(True)) == 2 * 50 * 64 * 4
    z = run(True)
    first, second = (torch.autograd.grad(z.square().sum(), (w, gamma), retain_graph=True) for _ in range(2))
    expected = torch.autograd.grad(run(False).square().sum(), (w, gamma))
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def _synchronised(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    x, w = torch.randn(5, 40, 6, dtype=torch.float64), torch.randn(8, 6, 3, dtype=torch.float64)
    share = (slice(0, 2), slice(2, 5))[rank]
    w.requires_grad_()
    running = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    gamma = torch.ones(8, dtype=torch.float64, requires_grad=True)
    group = torch.distributed.group.WORLD
    norm = BatchNorm(gamma, torch.zeros_like(gamma), *running, process_group=group)
    z = conv1d_norm(LazyActivation(x[share]), w, norm, activation="relu")
    materialize(z).values.square().sum().backward()
    torch.distributed.all_reduce(w.grad)
    torch.distributed.all_reduce(gamma.grad)
    if rank == 0:
        torch.save([t.detach() for t in (w.grad, gamma.grad, *running)], f"{folder}/results")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads have aborted a process that was ending by itself


@pytest.mark.skipif(dispatch.INTERPRETED, reason="processes would be spawned under the interpreter")
def test_statistics_over_processes(tmp_path):
    torch.multiprocessing.spawn(_synchronised, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    x, w = torch.randn(5, 40, 6, dtype=torch.float64), torch.randn(8, 6, 3, dtype=torch.float64)
    w.requires_grad_()
    norm = nn.BatchNorm1d(8, dtype=torch.float64)
    norm(F.conv1d(x.transpose(1, 2), w)).relu().square().sum().backward()
    wanted = w.grad, norm.weight.grad, norm.running_mean, norm.running_var
    for got, expected in zip(torch.load(tmp_path / "results"), wanted, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"norm": BatchNorm(torch.ones(3), torch.ones(4))},
            r"norm.gamma: expected shape \(4,\), got \(3,\)",
        ),
        (
            {"norm": BatchNorm(torch.ones(4), torch.ones(4), running_var=torch.ones(5))},
            r"norm.running_var: expected shape \(4,\), got \(5,\)",
        ),
        (
            {"x": LazyActivation(torch.ones(1, 1, 2))},
            "x: expected 2 or more output samples per channel in training, got 1",
        ),
        (
            {"residual": LazyActivation(torch.ones(2, 1, 4))},
            r"residual: expected shape \(2, 5, 4\), got \(2, 1, 4\)",
        ),
        (
            {"x": LazyActivation(torch.ones(2, 5, 2), lengths=torch.ones(3, dtype=torch.int32))},
            r"lengths: expected a tensor of shape \(2,\), got shape \(3,\)",
        ),
        ({"activation": "elu"}, "activation: expected None, 'relu', 'gelu' or 'silu', got 'elu'"),
    ],
)
def test_bad_input_is_named_in_one_line(change, message):
    arguments = {
        "x": LazyActivation(torch.ones(2, 5, 2)),
        "weight": torch.ones(4, 2, 1),
        "norm": BatchNorm(torch.ones(4), torch.ones(4)),
    }
    with pytest.raises(ValueError, match=message):
        conv1d_norm(**arguments | change)


def test_what_cannot_be_joined_is_named():
    y, vectors = torch.randn(2, 9, 5, device=DEVICE), torch.rand(3, 5, device=DEVICE)
    with pytest.raises(
        ValueError, match="x: expected a LazyActivation with a mean and no activation, got a materialized one"
    ):
        join(LazyActivation(y), None)
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 9, 5\), got \(2, 8, 5\)"):
        join(LazyActivation(y, *vectors), LazyActivation(y[:, 1:]))
    with pytest.raises(TypeError, match="residual: expected a LazyActivation, got Tensor"):
        join(LazyActivation(y, *vectors), y)
    weight = torch.ones(4, 5, 1, device=DEVICE)
    with pytest.raises(TypeError, match=r"norm\.gamma: expected a torch.Tensor, got None"):
        conv1d_norm(LazyActivation(y), weight, BatchNorm(None, torch.ones(4)))
    with pytest.raises(TypeError, match="norm: expected a BatchNorm, got Tensor"):
        conv1d_norm(LazyActivation(y), weight, torch.ones(4))


def test_join_without_activation_or_residual():
    y, (mean, scale, shift) = torch.randn(2, 9, 5, device=DEVICE), torch.rand(3, 5, device=DEVICE)
    z = join(LazyActivation(y, mean, scale, shift), None)
    torch.testing.assert_close(z.values, (y - mean) * scale + shift)


def test_a_shift_that_alone_needs_a_gradient_gets_it():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator).to(DEVICE)  # noqa: E731
    x, first, second, cotangent = draw(2, 9, 3), draw(4, 3, 3), draw(5, 4, 3), draw(2, 9, 5)
    beta, ones = draw(4).requires_grad_(), torch.ones(5, device=DEVICE)
    y = conv1d_norm(LazyActivation(x), first, BatchNorm(ones[:4], beta), padding=1, activation="relu")
    z = materialize(conv1d_norm(y, second, BatchNorm(ones, 0 * ones), padding=1)).values
    (grad,) = torch.autograd.grad((z * cotangent).sum(), beta)
    plain = beta.detach().double().requires_grad_()
    h = F.conv1d(x.double().mT, first.double(), padding=1)
    h = F.relu(F.batch_norm(h, None, None, ones[:4].double(), plain, training=True))
    h = F.batch_norm(F.conv1d(h, second.double(), padding=1), None, None, training=True)
    (expected,) = torch.autograd.grad((h.mT * cotangent.double()).sum(), plain)
    torch.testing.assert_close(grad.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_are_not_rounded(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (50 + torch.randn(4, 100, 3, generator=generator)).to(DEVICE, dtype)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    weight = torch.eye(3, device=DEVICE, dtype=dtype)[:, :, None]
    ones = torch.ones(3, device=DEVICE)
    conv1d_norm(LazyActivation(x), weight, BatchNorm(ones, 0 * ones, mean, var, momentum=1.0))
    torch.testing.assert_close(mean, x.float().mean((0, 1)), atol=1e-3, rtol=0)
    torch.testing.assert_close(var, x.float().var((0, 1)), atol=1e-2, rtol=1e-2)


def test_pools_of_records_without_a_sample_and_of_lengths_beyond_the_end():
    x = torch.randn(2, 4, 1, device=DEVICE)
    pooled = max_pool1d(LazyActivation(x, lengths=torch.tensor([0, 4], device=DEVICE)), 2, 2, 1).values
    assert pooled.isfinite().all()
    assert (pooled[0] == 0).all()
    odd = torch.ones(1, 3, 1, device=DEVICE)
    beyond = mean_pool1d(LazyActivation(odd, lengths=torch.tensor([9], device=DEVICE))).values
    torch.testing.assert_close(beyond, torch.ones(1, 2, 1, device=DEVICE))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_is_0_beyond_its_records_ends(activation, training):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator).to(DEVICE)  # noqa: E731
    x, weight, r, ones = draw(2, 8, 3), draw(4, 3, 3), draw(2, 8, 4), torch.ones(4, device=DEVICE)
    lengths = torch.tensor([4, 8], device=DEVICE)
    shorter = torch.tensor([2, 8], device=DEVICE)
    clean, spoiled = r.clone(), r.clone()
    clean[0, 2:], spoiled[0, 2:] = 0.0, torch.nan
    found = []
    for given in (clean, spoiled):
        leaves = [t.clone().requires_grad_() for t in (x, weight, given)]
        z = conv1d_norm(
            LazyActivation(leaves[0], lengths=lengths),
            leaves[1],
            BatchNorm(ones, 0 * ones, 0 * ones, ones.clone(), training=training),
            padding=1,
            residual=LazyActivation(leaves[2], lengths=shorter),
            activation=activation,
        ).values
        inside = z[0, :4].square().sum() + z[1].square().sum()
        found.append([z[0, :4], z[1], *torch.autograd.grad(inside, leaves)])
    for with_zeros, with_nan in zip(*found, strict=True):
        assert with_nan.isfinite().all()
        torch.testing.assert_close(with_nan, with_zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_evaluation_in_half_precision_errs_no_more_than_torch(dtype):
    """Channels whose means are thirty standard deviations away from 0."""
    generator = torch.Generator().manual_seed(0)
    x = (30 + torch.randn(2, 50, 4, generator=generator)).to(DEVICE, dtype)
    weight = torch.eye(4, device=DEVICE, dtype=dtype)[:, :, None]
    # None of them is a number of half precision.
    gamma, beta = (torch.randn(4, generator=generator).to(DEVICE) for _ in range(2))
    mean, var = (offset + torch.rand(4, generator=generator).to(DEVICE) for offset in (30, 0.5))
    norm = BatchNorm(gamma, beta, mean, var, training=False)
    found = conv1d_norm(LazyActivation(x), weight, norm).values
    expected = F.batch_norm(x.double().mT, mean.double(), var.double(), gamma.double(), beta.double()).mT
    theirs = F.batch_norm(x.mT, mean, var, gamma, beta).mT
    assert found.dtype == dtype
    assert (found - expected).norm() <= 2 * (theirs - expected).norm()
