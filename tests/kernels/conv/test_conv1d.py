"""The fused convolution against an oracle. Run with TRITON_INTERPRET=1 (or on a GPU) it tests the kernel."""

import math

import pytest
import torch
from torch import Tensor

from ecgot.kernels import BatchNorm, LazyActivation, conv1d, conv1d_backends, conv1d_norm, dispatch
from ecgot.kernels.conv import torch_conv1d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = dispatch.INTERPRETED or DEVICE == "cuda"
OPTIONAL = ("bias", "scale", "shift", "residual")

# (B, T, C_in, C_out, K, stride, padding, dilation[, groups]): nothing is a multiple of anything.
SHAPES = [
    (2, 37, 12, 19, 5, 1, 2, 1),
    (3, 50, 12, 33, 15, 2, 7, 1),
    (1, 1, 3, 5, 1, 1, 0, 1),
    (2, 3, 7, 2, 9, 1, 4, 1),  # K > T
    (2, 41, 17, 70, 3, 3, 1, 2),
    (1, 130, 1, 1, 4, 1, 0, 3),
    (2, 9, 70, 196, 1, 2, 0, 1),
    (2, 33, 48, 66, 5, 2, 2, 1, 3),  # groups of 16 channels
    (2, 21, 12, 6, 4, 1, 3, 1, 2),  # of few
    (2, 40, 70, 70, 7, 1, 3, 2, 70),  # depthwise
    (2, 40, 5, 10, 3, 4, 1, 2, 5),  # depthwise with two outputs each; a stride and a dilation with a factor
    (1, 30, 4, 40, 3, 1, 1, 1, 4),  # one channel to ten
    (2, 30, 12, 8, 5, 4, 3, 2, 1),  # two of the four phases of the stride meet no tap
]
# Error allowed against fp64 on inputs of the dtype, and why.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,  # sums of up to 200 products of size 1
    torch.float16: 2e-2,  # the result is rounded to 2^-11 of values up to about 20
    torch.bfloat16: 1.6e-1,  # the same, with 2^-8
}


def oracle(
    x,
    weight,
    bias=None,
    scale=None,
    shift=None,
    residual=None,
    *,
    stride,
    padding,
    dilation,
    groups=1,
    activation=None,
):
    """Taps one after the other, in fp64: no convolution of torch's is involved."""
    batch, length, channels = x.shape
    k = weight.shape[2]
    padded = torch.cat(
        [x.new_zeros(batch, padding, channels), x, x.new_zeros(batch, padding, channels)], dim=1
    )
    t_out = (length + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    y = 0
    for tap in range(k):
        rows = [t * stride + tap * dilation for t in range(t_out)]
        x_groups = padded[:, rows].unflatten(2, (groups, -1))
        w_groups = weight[:, :, tap].unflatten(0, (groups, -1))
        y = y + torch.einsum("btgc,goc->btgo", x_groups, w_groups).flatten(2)
    y = y if bias is None else y + bias
    y = y if scale is None else y * scale
    y = y if shift is None else y + shift
    y = y if residual is None else y + residual
    if activation == "relu":
        return y.clamp_min(0)
    if activation == "gelu":
        return y * (1 + torch.erf(y / math.sqrt(2))) / 2
    if activation == "silu":
        return y / (1 + torch.exp(-y))
    return y


def layer(
    shape, *, optional=OPTIONAL, dtype=torch.float32, seed=0
) -> tuple[dict[str, Tensor], dict[str, int]]:
    batch, length, c_in, c_out, k, stride, padding, dilation, groups = (*shape, 1)[:9]
    t_out = (length + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "x": (batch, length, c_in),
        "weight": (c_out, c_in // groups, k),
        "bias": (c_out,),
        "scale": (c_out,),
        "shift": (c_out,),
        "residual": (batch, t_out, c_out),
    }
    tensors = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        for name, size in sizes.items()
        if name in ("x", "weight", *optional)
    }
    tensors["weight"] /= math.sqrt(c_in // groups * k)
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def check_against_oracle(tensors, geometry, activation, tolerance):
    """Forward and the gradient of every tensor."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    truth = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    y = conv1d(**leaves, **geometry, activation=activation)
    expected = oracle(**truth, **geometry, activation=activation)
    assert y.dtype == tensors["x"].dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
    expected_grads = torch.autograd.grad(expected, list(truth.values()), cotangent.double())
    for name, grad, expected_grad in zip(leaves, grads, expected_grads, strict=True):
        size = expected_grad.abs().max().item() + 1
        torch.testing.assert_close(
            grad.double(), expected_grad, atol=5 * tolerance * size, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


# Every shape with one activation; every activation with one shape each that is narrow, dense and depthwise.
@pytest.mark.parametrize(
    ("shape", "activation"),
    [(shape, "relu") for shape in SHAPES]
    + [(SHAPES[index], activation) for index in (2, 6, 9) for activation in (None, "gelu", "silu")],
)
def test_equals_fp64_oracle(shape, activation, poisoned_empty):
    tensors, geometry = layer(shape)
    check_against_oracle(tensors, geometry, activation, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "optional", [(), ("bias",), ("scale",), ("shift",), ("residual",), ("scale", "shift")]
)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_every_argument_alone(optional, activation):
    tensors, geometry = layer(SHAPES[0], optional=optional)
    check_against_oracle(tensors, geometry, activation, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    tensors, geometry = layer(SHAPES[0], dtype=dtype)
    # A smooth activation: rounding to fp16 flips ReLU at values near 0, which is no error of the kernel.
    check_against_oracle(tensors, geometry, "silu", TOLERANCE[dtype])


def test_autocast_casts_as_torch_does():
    tensors, geometry = layer(SHAPES[0])
    with torch.autocast(DEVICE, torch.bfloat16):
        y = conv1d(**tensors, **geometry)
    assert y.dtype == torch.bfloat16
    kept = ("scale", "shift")
    lower = {name: t if name in kept else t.bfloat16() for name, t in tensors.items()}
    torch.testing.assert_close(y, conv1d(**lower, **geometry))


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    k, dilation = draw(1, 12), draw(1, 4)
    padding = draw(0, 8)
    length = max(1, dilation * (k - 1) + 1 - 2 * padding) + draw(0, 90)
    shape = (draw(1, 4), length, draw(1, 50), draw(1, 80), k, draw(1, 5), padding, dilation)
    tensors, geometry = layer(shape, seed=seed)
    check_against_oracle(tensors, geometry, "gelu", TOLERANCE[torch.float32])


def test_equals_torch_conv1d():
    tensors, geometry = layer(SHAPES[1], optional=("bias",))
    expected = torch.nn.functional.conv1d(
        tensors["x"].transpose(1, 2), tensors["weight"], tensors["bias"], **geometry
    )
    torch.testing.assert_close(conv1d(**tensors, **geometry), expected.transpose(1, 2), atol=2e-5, rtol=1e-5)


def test_strided_input():
    tensors, geometry = layer(SHAPES[0])
    tensors["x"] = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)  # the loader's [B, L, T], viewed
    tensors["residual"] = torch.stack([tensors["residual"]] * 2, dim=-1)[..., 0]
    assert not tensors["x"].is_contiguous()
    check_against_oracle(tensors, geometry, "relu", TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[9]])
def test_what_lies_beyond_a_record_is_not_read(shape):
    tensors, geometry = layer(shape, optional=("bias",))
    lengths = torch.tensor([9, 31, 50][: shape[0]])
    tensors["x"] = torch.where(
        torch.arange(shape[1]).to(DEVICE)[:, None] < lengths.to(DEVICE)[:, None, None], tensors["x"], math.nan
    )
    x, weight = (tensors[name].requires_grad_() for name in ("x", "weight"))
    y = conv1d(**tensors, **geometry, lengths=lengths)
    alone = [conv1d(x[b : b + 1, :n], weight, tensors["bias"], **geometry)[0] for b, n in enumerate(lengths)]
    for padded, cropped in zip(y, alone, strict=True):
        torch.testing.assert_close(padded[: len(cropped)], cropped)
    total = lambda rows: sum(r[: len(c)].square().sum() for r, c in zip(rows, alone, strict=True))  # noqa: E731
    grads, expected = (torch.autograd.grad(total(rows), (x, weight)) for rows in (y, alone))
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_precisions(precision):
    tensors, geometry = layer(SHAPES[1], optional=())
    expected = conv1d(**tensors, **geometry)
    y = conv1d(**tensors, **geometry, precision=precision)
    torch.testing.assert_close(y, expected, atol=2e-2 if precision == "tf32" else 1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "ieee"])
@pytest.mark.parametrize("how", ["conv1d", "compiled", "conv1d_norm"])
def test_the_library_follows_the_precision_and_leaves_the_setting(how, precision, monkeypatch):
    """Here without a GPU: what the setting is while torch convolves."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("torch before 2.9 has another setting")
    setting, seen = torch.backends.cudnn.conv, []

    def watched(name: str) -> None:
        run = getattr(torch_conv1d, name)

        def note(*args, **kwargs):
            seen.append((name, setting.fp32_precision))
            return run(*args, **kwargs)

        monkeypatch.setattr(torch_conv1d, name, note)

    watched("convolution")
    watched("_convolution_gradients")
    monkeypatch.setattr(torch_conv1d, "rounds_products", lambda x: x.dtype == torch.float32)
    before = setting.fp32_precision
    x = torch.randn(2, 20, 4, device=DEVICE, requires_grad=True)
    w = torch.randn(5, 4, 3, device=DEVICE, requires_grad=True)

    def step() -> Tensor:
        options = {"precision": precision, "backend": "torch", "padding": 1}
        if how == "conv1d_norm":
            ones = torch.ones(5, device=DEVICE)
            return conv1d_norm(LazyActivation(x), w, BatchNorm(ones, 0 * ones), **options).values.sum()
        return conv1d(x, w, **options).square().sum()

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if how == "compiled" else step
    torch.autograd.grad(run(), (x, w))
    expected = "tf32" if precision == "tf32" else "ieee"
    assert {name for name, _ in seen} == {"convolution", "_convolution_gradients"}
    # Compilation also runs operators on tensors without values, but never outside the setting.
    assert {value for _, value in seen} == {expected}
    assert setting.fp32_precision == before
    with pytest.raises(RuntimeError, match="no matter"), torch_conv1d.library_precision(x, precision):
        raise RuntimeError("no matter")
    assert setting.fp32_precision == before


def error_of_torch(tensors, geometry, cotangent):
    """y and gradients of torch.nn.functional.conv1d, channels-first, in the tensors' dtype."""
    x, weight = (tensors[name].detach().clone().requires_grad_() for name in ("x", "weight"))
    y = torch.nn.functional.conv1d(x.transpose(1, 2), weight, **geometry).transpose(1, 2)
    return y, *torch.autograd.grad(y, (x, weight), cotangent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_error_is_at_most_twice_that_of_torch(dtype, seed):
    generator = torch.Generator().manual_seed(200 + seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    groups = (1, 1, 4, 12)[seed]
    shape = (2, draw(30, 70), 12 * draw(1, 4), 196 if seed == 0 else 12 * draw(1, 4), draw(1, 9))
    shape = (*shape, draw(1, 3), draw(0, 4), 1, groups)
    tensors, geometry = layer(shape, optional=(), dtype=dtype, seed=seed)
    leaves = [t.requires_grad_() for t in tensors.values()]
    y = conv1d(*leaves, **geometry)
    cotangent = torch.randn(y.shape, generator=generator).to(y)
    ours = (y, *torch.autograd.grad(y, leaves, cotangent))
    torchs = error_of_torch(tensors, geometry, cotangent)
    truth = [t.detach().double().requires_grad_() for t in leaves]
    expected = oracle(*truth, **geometry)
    expected = (expected, *torch.autograd.grad(expected, truth, cotangent.double()))
    for name, a, b, c in zip(("y", "x", "weight"), ours, torchs, expected, strict=True):
        error, theirs = ((t.double() - c).square().mean().sqrt().item() for t in (a, b))
        # Sums in fp32 may come out exact by chance; an ulp of the largest entry is no error.
        assert error <= 2 * theirs + torch.finfo(torch.float32).eps * c.abs().max().item(), name


def test_the_same_input_gives_the_same_bits():
    tensors, geometry = layer((2, 300, 12, 33, 5, 2, 2, 1), optional=())
    leaves = [t.requires_grad_() for t in tensors.values()]
    y = conv1d(*leaves, **geometry)
    first, second = (torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_choice_of_backend_can_be_seen_and_forced():
    wide = conv1d_backends((512, 512, 3), dtype=torch.bfloat16)
    narrow = conv1d_backends((64, 64, 5), stride=2, dtype=torch.bfloat16)
    assert set(wide.values()) == {"torch"}
    assert narrow == {"forward": "triton", "input_gradient": "torch", "weight_gradient": "triton"}
    tensors, geometry = layer(SHAPES[0], optional=())
    outputs = [conv1d(**tensors, **geometry, backend=backend) for backend in ("auto", "torch", "triton")]
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], atol=1e-5, rtol=1e-5)


def test_empty_batch():
    tensors, geometry = layer((0, 20, 3, 4, 5, 1, 2, 1), optional=("bias", "scale"))
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    y = conv1d(**leaves, **geometry, activation="relu")
    assert y.shape == (0, 20, 4)
    y.sum().backward()
    assert leaves["weight"].grad.abs().sum() == 0
    assert leaves["scale"].grad.abs().sum() == 0


def test_nan_is_not_swallowed_by_relu():
    tensors, geometry = layer(SHAPES[0])
    tensors["x"][1, 5] = math.nan
    y = conv1d(**tensors, **geometry, activation="relu")
    assert y[1, 5].isnan().all()
    assert not y[0].isnan().any()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradients_by_finite_differences(activation):
    tensors, geometry = layer((2, 7, 3, 4, 3, 2, 1, 1), dtype=torch.float64)
    names = list(tensors)

    def apply(*values):
        return conv1d(**dict(zip(names, values, strict=True)), **geometry, activation=activation)

    assert torch.autograd.gradcheck(apply, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck(statistics):
    (x, w), c = (t.values() for t in layer((2, 7, 3, 4, 3, 2, 1, 1), optional=()))
    vectors = [torch.rand(3, device=DEVICE) for _ in range(3)]
    lengths = torch.tensor([7, 4], dtype=torch.int32, device=DEVICE)
    signal = (x, *vectors, "relu", lengths)
    after = (None, None, None, None, None, statistics, lengths // 2, "fp32", "auto")
    torch.library.opcheck(torch.ops.ecgot.conv1d_forward.default, (*signal, w, *c, 1, *after))
    y = torch.rand(2, 4, 4, device=DEVICE)
    of_y = [torch.rand(4, device=DEVICE) for _ in range(3)]
    grad = (y.sin(), y if statistics else None, *(of_y if statistics else [None] * 3), lengths // 2)
    torch.library.opcheck(
        torch.ops.ecgot.conv1d_gradients.default,
        (*grad, w, *c, 1, x, *vectors, None, *signal[4:], True, statistics, "fp32", "auto"),
    )


def test_compiles_whole():
    tensors, geometry = layer(SHAPES[0])
    weight = tensors["weight"].requires_grad_()
    step = lambda: conv1d(**tensors, **geometry, activation="relu").square().mean()  # noqa: E731
    (expected,) = torch.autograd.grad(step(), weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(), weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 3)}, r"x: expected \[B, T, C_in\] with .*, got shape \(5, 3\)"),
        ({"x": [[[1.0]]]}, "x: expected a torch.Tensor, got list"),
        ({"x": torch.zeros(2, 0, 3)}, r"x: expected .*, got shape \(2, 0, 3\)"),
        ({"x": torch.zeros(2, 5, 0)}, r"x: expected .*, got shape \(2, 5, 0\)"),
        ({"weight": torch.zeros(0, 3, 3)}, r"weight: expected .*, got shape \(0, 3, 3\)"),
        ({"weight": torch.zeros(4, 3, 0)}, r"weight: expected .*, got shape \(4, 3, 0\)"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.int32)}, "x: expected floating point, got dtype torch.int32"),
        (
            {"weight": torch.zeros(4, 2, 3)},
            r"weight: expected \[C_out, 3, K\] with .*, got shape \(4, 2, 3\)",
        ),
        (
            {"weight": torch.zeros(4, 3, 3, dtype=torch.float64)},
            "weight: expected the dtype of x, torch.float32, got torch.float64",
        ),
        ({"weight": torch.zeros(4, 3, 9)}, "x: expected T >= 9 for this kernel, got T = 5"),
        ({"scale": 0.5}, "scale: expected a torch.Tensor, got float"),
        ({"stride": 0}, "stride: expected an integer >= 1, got 0"),
        ({"padding": -1}, "padding: expected an integer >= 0 or a pair of them, got -1"),
        ({"dilation": 1.5}, "dilation: expected an integer >= 1, got 1.5"),
        ({"activation": "tanh"}, "activation: expected None, 'relu', 'gelu' or 'silu', got 'tanh'"),
        ({"groups": 2}, "groups: expected a divisor of C_in = 3, got 2"),
        ({"groups": 3, "weight": torch.zeros(4, 1, 3)}, "groups: expected a divisor of C_out = 4, got 3"),
        (
            {"lengths": torch.tensor([3])},
            r"lengths: expected a tensor of shape \(2,\), got shape \(1,\)",
        ),
        ({"lengths": torch.tensor([3.0, 2.0])}, "lengths: expected integers, got dtype torch.float32"),
        ({"precision": "fp16"}, "precision: expected 'fp32', 'tf32' or 'ieee', got 'fp16'"),
        ({"backend": "cudnn"}, "backend: expected 'auto', 'triton' or 'torch', got 'cudnn'"),
        ({"scale": torch.zeros(3)}, r"scale: expected shape \(4,\), got \(3,\)"),
        ({"residual": torch.zeros(2, 5, 4)}, r"residual: expected shape \(2, 3, 4\), got \(2, 5, 4\)"),
    ],
)
def test_bad_input_is_named_in_one_line(change, message):
    arguments = {"x": torch.zeros(2, 5, 3), "weight": torch.zeros(4, 3, 3)} | change
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        conv1d(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "geometry"),
    [
        ((2, 1, 3), (2, 3, 1), {"stride": 2, "padding": 1, "dilation": 2}),
        ((1, 1, 16), (16, 16, 3), {"stride": 2, "padding": 5, "dilation": 2}),
        ((3, 131, 12), (64, 12, 7), {"stride": 3, "padding": 20, "dilation": 7}),
        ((2, 9, 4), (5, 4, 3), {"stride": 1, "padding": 6, "dilation": 1}),
    ],
)
def test_windows_that_lie_in_the_padding(x_shape, w_shape, geometry):
    """Here a vendor's convolution has crashed, returned garbage or given a wrong weight gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(x_shape, generator=generator, dtype=torch.float64)
    w = torch.randn(w_shape, generator=generator, dtype=torch.float64)
    steps = geometry["stride"], geometry["dilation"]
    padded = torch.nn.functional.pad(x, (0, 0, geometry["padding"], geometry["padding"]))
    windows = padded.unfold(1, steps[1] * (w_shape[2] - 1) + 1, steps[0])[..., :: steps[1]]  # [B, T, C, K]
    expected = torch.einsum("btck,ock->bto", windows, w)
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected_w = torch.einsum("btck,bto->ock", windows, cotangent)
    leaf_x, leaf_w = x.float().to(DEVICE).requires_grad_(), w.float().to(DEVICE).requires_grad_()
    y = conv1d(leaf_x, leaf_w, torch.zeros(w_shape[0], device=DEVICE), **geometry)
    grad_x, grad_w = torch.autograd.grad((y * cotangent.float().to(DEVICE)).sum(), (leaf_x, leaf_w))
    torch.testing.assert_close(y.detach().cpu().double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad_w.cpu().double(), expected_w, atol=1e-3, rtol=1e-4)
    # The map is linear: <y(x), pull> = <x, grad_x>.
    torch.testing.assert_close(
        (expected * cotangent).sum(), (x * grad_x.cpu().double()).sum(), atol=1e-2, rtol=1e-4
    )


def test_one_output_channel_with_a_strided_weight():
    x = torch.randn(2, 9, 4, device=DEVICE)
    w = torch.randn(3, 4, 1, device=DEVICE).permute(2, 1, 0).requires_grad_()  # [1, 4, 3]
    (grad,) = torch.autograd.grad(conv1d(x, w, padding=1).square().sum(), w)
    (expected,) = torch.autograd.grad(
        torch.nn.functional.conv1d(x.transpose(1, 2), w, padding=1).square().sum(), w
    )
    torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-4)
