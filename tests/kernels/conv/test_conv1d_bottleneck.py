"""The bottleneck in one kernel against fp64. TRITON_INTERPRET=1 (or a GPU) makes it test the kernel."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ecgot.kernels import FusedLayer, conv1d_bottleneck, dispatch
from ecgot.models.encoders import encoder, fuse_norms, plain_encoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = dispatch.INTERPRETED or DEVICE == "cuda"
# (B, T, C, M, W, N, K, stride, padding, dilation)
SHAPES = [
    (1, 70, 64, 64, 256, 64, 5, 1, 2, 1),
    (2, 37, 12, 19, 50, 33, 5, 2, 2, 1),
    (1, 1, 3, 5, 7, 2, 1, 1, 0, 1),
    (3, 2, 17, 16, 33, 64, 7, 1, 3, 1),  # K > T
    (1, 130, 40, 8, 20, 5, 3, 3, 4, 2),
    (2, 20, 12, 70, 24, 9, 3, 1, 1, 1),  # too wide for one program
    (0, 20, 12, 8, 24, 9, 3, 1, 1, 1),
]


def made(shape, dtype=torch.float32, *, scale=False, narrow=True):
    batch, length, c, m, w, n, k, stride, padding, dilation = shape
    t_out = (length + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    def layer(c_out: int, c_in: int, k: int) -> FusedLayer:
        weight = draw(c_out, c_in, k) / (c_in * k) ** 0.5
        return FusedLayer(weight, draw(c_out) if scale else None, draw(c_out))

    arguments = {
        "x": draw(batch, length, c),
        "middle": layer(m, c, k),
        "wide": layer(w, m, 1),
        "residual": draw(batch, t_out, w),
        "narrow": layer(n, w, 1) if narrow else None,
    }
    return arguments, {"stride": stride, "padding": padding, "dilation": dilation}


def plain(x, middle, wide, residual, narrow, *, dtype=torch.float64, **geometry):
    """torch's convolutions on [B, C, T], in fp64 or in x's dtype."""

    def layer(x: Tensor, given: FusedLayer, **geometry: int) -> Tensor:
        weight, scale, shift = given.to(dtype)
        y = F.conv1d(x, weight, **geometry)
        return (y if scale is None else y * scale[:, None]) + shift[:, None]

    y = F.relu(layer(x.to(dtype).mT, middle, **geometry))
    y = F.relu(layer(y, wide) + residual.to(dtype).mT)
    return y.mT, None if narrow is None else F.relu(layer(y, narrow)).mT


VARIANTS = [(False, True), (True, True), (True, False)]  # scale, narrow


@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "narrow"),
    [(shape, torch.float32, *variant) for shape in SHAPES for variant in VARIANTS]
    + [(SHAPES[1], half, *variant) for half in (torch.float16, torch.bfloat16) for variant in VARIANTS],
)
def test_is_as_exact_as_torch(shape, dtype, scale, narrow, poisoned_empty):
    arguments, geometry = made(shape, dtype, scale=scale, narrow=narrow)
    found = conv1d_bottleneck(**arguments, **geometry)
    expected = plain(**arguments, **geometry)
    theirs = plain(**arguments, **geometry, dtype=dtype)
    for ours, truth, their in zip(found, expected, theirs, strict=True):
        if truth is None:
            assert ours is None
            continue
        assert ours.dtype == dtype
        assert ours.shape == truth.shape
        if truth.numel():
            size = truth.abs().max()
            error, allowed = (ours - truth).abs().max(), 2 * (their - truth).abs().max()
            assert error <= allowed + 4 * torch.finfo(dtype).eps * size


def test_what_lies_beyond_a_records_end_is_not_read():
    arguments, geometry = made((3, 40, 12, 16, 24, 9, 5, 2, 2, 1))
    lengths = torch.tensor([40, 17, 1], device=DEVICE)
    arguments["x"][1, 17:] = torch.nan
    arguments["x"][2, 1:] = torch.inf
    y, z = conv1d_bottleneck(**arguments, **geometry, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        t_out = (length + 4 - 5) // 2 + 1
        alone = arguments | {
            "x": arguments["x"][row : row + 1, :length],
            "residual": arguments["residual"][row : row + 1, :t_out],
        }
        for ours, expected in zip((y, z), conv1d_bottleneck(**alone, **geometry), strict=True):
            torch.testing.assert_close(ours[row, :t_out], expected[0], atol=1e-5, rtol=1e-5)


def test_a_channels_first_signal_is_read_as_it_lies():
    arguments, geometry = made(SHAPES[1])
    expected = conv1d_bottleneck(**arguments, **geometry)
    arguments["x"] = arguments["x"].mT.contiguous().mT
    for ours, other in zip(conv1d_bottleneck(**arguments, **geometry), expected, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


def test_a_gradient_can_be_had():
    arguments, geometry = made((2, 20, 3, 4, 8, 4, 3, 1, 1, 1), torch.float64)
    arguments["x"].requires_grad_()
    grads = [
        torch.autograd.grad(function(**arguments, **geometry)[1].sum(), arguments["x"])[0]
        for function in (conv1d_bottleneck, plain)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"residual": torch.zeros(2, 18, 50)},
            r"residual: expected shape \(2, 19, 50\), got \(2, 18, 50\)",
        ),
        (
            {"wide": FusedLayer(torch.zeros(50, 18, 1), None, torch.zeros(50))},
            r"wide.weight: expected \[C_out, 19, 1\], got shape \(50, 18, 1\)",
        ),
        (
            {"narrow": FusedLayer(torch.zeros(9, 50, 3), None, torch.zeros(9))},
            r"narrow.weight: expected \[C_out, 50, 1\], got shape \(9, 50, 3\)",
        ),
        (
            {"narrow": FusedLayer(torch.zeros(9, 50, 1), None, torch.zeros(8))},
            r"narrow.shift: expected shape \(9,\), got \(8,\)",
        ),
        (
            {"narrow": FusedLayer(torch.zeros(9, 50, 1), torch.ones(9), torch.zeros(9))},
            r"narrow.scale: expected one for every layer or for none, got one",
        ),
        ({"backend": "cuda"}, r"backend: expected .*, got 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments, geometry = made(SHAPES[1])
    with pytest.raises(ValueError, match=message):
        conv1d_bottleneck(**{**arguments, **geometry, **change})


def test_another_dtype_is_refused():
    arguments, geometry = made(SHAPES[1])
    arguments["residual"] = arguments["residual"].half()
    with pytest.raises(
        TypeError, match=r"residual: expected the dtype of x, torch.float32, got torch.float16"
    ):
        conv1d_bottleneck(**arguments, **geometry)


@pytest.mark.skipif(not TRITON, reason="needs TRITON_INTERPRET=1 or a GPU")
def test_an_encoder_runs_its_bottlenecks_there(monkeypatch):
    from ecgot.kernels.conv import triton_bottleneck

    calls = []
    whole = triton_bottleneck.bottleneck
    monkeypatch.setattr(
        triton_bottleneck, "bottleneck", lambda *given: calls.append(given[3] is not None) or whole(*given)
    )
    torch.manual_seed(0)
    options = {"blocks": (2, 1), "width": 64}
    ours = encoder("xresnet1d101", **options).to(DEVICE)
    twin = plain_encoder("xresnet1d101", **options).to(DEVICE)
    for module in ours.modules():  # blocks that differ from their shortcuts
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean)
    twin.load_state_dict(ours.state_dict())
    waveform = torch.randn(2, 12, 100, device=DEVICE)
    with torch.no_grad():
        found = fuse_norms(ours)(waveform).tokens
        expected = twin.eval()(waveform)
    assert calls == [True, True, False]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
