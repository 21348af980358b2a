"""The ECG encoders against their twins in plain torch; masks, batch mates, published names, memory."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ecgot.errors import EcgotError
from ecgot.models.encoders import ENCODERS, encoder, fuse_norms, masked_mean, plain_encoder, published

SMALLEST = {  # the same classes with less of everything, for what would take long
    "resnet1d": {"widths": (8, 12), "blocks": (1, 2), "strides": (2, 2)},
    "merl_resnet18": {"widths": (8, 12), "blocks": (2, 1)},
    "merl_resnet50": {"widths": (16, 24), "blocks": (2, 1), "stem_width": 8},
    "resnet1d_wang": {"widths": (12,) * 3},
    "xresnet1d101": {"blocks": (2, 1, 2, 1), "width": 32},
    "inception1d": {"filters": 4, "bottleneck": 5},
    "vit1d_tiny": {"depth": 2, "width": 24, "heads": 2, "patch_size": 10, "seq_len": 400},
    "net1d": {"widths": (32, 48), "blocks": (2, 2), "stem_width": 16},
}


def with_statistics(module: nn.Module) -> nn.Module:
    """Norms with statistics and weights that are not their initial values."""
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(layer.bias, std=0.2, generator=generator)
            nn.init.normal_(layer.running_mean, std=0.2, generator=generator)
            nn.init.uniform_(layer.running_var, 0.5, 2.0, generator=generator)
    return module


def twins(name: str, *, small: bool = True, leads: int = 12) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    options = SMALLEST[name] if small else {}
    fused = with_statistics(encoder(name, leads=leads, **options))
    plain = plain_encoder(name, leads=leads, **options)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def records(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_are_those_of_the_twin(name):
    fused, plain = twins(name, small=False)
    assert {key: p.shape for key, p in fused.named_parameters()} == {
        key: p.shape for key, p in plain.named_parameters()
    }
    # In fp64, as rounding in fp32 differs from one CPU's instructions to another's.
    x = records(2, 12, 1000)
    with torch.no_grad():
        expected = plain.double().eval()(x)
        size = expected.abs().max().item()  # grows with depth, as the norms' statistics are not the data's
        torch.testing.assert_close(fused.double().eval()(x).tokens, expected, atol=1e-13 * size, rtol=0)


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_the_twin(name, training):
    """In fp64, so that rounding cannot hide a difference."""
    fused, plain = (module.double().train(training) for module in twins(name))
    x, x_plain = (records(3, 12, 301).requires_grad_() for _ in range(2))
    out, expected = fused(x), plain(x_plain)
    torch.testing.assert_close(out.tokens, expected, atol=1e-9, rtol=1e-9)
    assert out.mask.all()
    assert out.tokens.shape == (3, out.mask.shape[1], fused.width)
    pull = records(*expected.shape, seed=3)
    (out.tokens * pull).sum().backward()
    (expected * pull).sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad, atol=1e-8, rtol=1e-7)
    for (key, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        size = q.grad.abs().max().item()
        torch.testing.assert_close(
            p.grad, q.grad, atol=1e-7 * size + 1e-9, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
        )
    for (key, b), c in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_lower_precision_errs_about_as_the_twin(name, dtype, training):
    """Tokens and weight gradients of the whole network, against the twin in fp64."""
    fused, plain = (module.train(training) for module in twins(name))
    truth = copy.deepcopy(plain).double()
    x = records(4, 12, 301).to(dtype)
    pull = records(*truth(x.double()).shape, seed=3).to(dtype)

    def results(module: nn.Module, x: Tensor) -> list[Tensor]:
        parameters = list(module.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            y = module(x)
        y = getattr(y, "tokens", y)
        return [y, *torch.autograd.grad((y * pull.to(y.dtype)).sum(), parameters)]

    for module in (fused, plain, truth):
        module.load_state_dict(fused.state_dict())
    wanted = results(truth, x.double())
    ours, theirs = results(fused, x.float()), results(plain, x.float())
    if dtype == torch.bfloat16:
        ours, theirs = results(fused, x), results(plain, x)

    def distance(got: list[Tensor]) -> float:
        shares = [
            ((g.double() - w).norm() / (w.norm() + 1e-6)).square() for g, w in zip(got, wanted, strict=True)
        ]
        return sum(shares).sqrt().item()

    assert distance(ours) <= 2 * distance(theirs) + 1e-6


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("length", [400, 399, 333, 130, 33, 1])
def test_a_masked_record_gives_what_the_cropped_record_gives(name, length):
    model = twins(name)[0].eval()
    signal = records(2, 12, 400).float()
    signal[0, :, length:] = float("nan")  # what lies behind the end must not be read
    masked = model(signal, torch.tensor([length, 400]))
    if name.startswith("vit") and length < 10:  # not one whole patch
        assert not masked.mask[0].any()
        assert (masked.tokens[0] == 0).all()
        return
    cropped = model(signal[:1, :, :length])
    count = cropped.tokens.shape[1]
    assert masked.mask[0].tolist() == [True] * count + [False] * (masked.mask.shape[1] - count)
    torch.testing.assert_close(masked.tokens[:1, :count], cropped.tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.pooled[:1], cropped.pooled, atol=1e-5, rtol=1e-4)
    assert (masked.tokens[0, count:] == 0).all()
    torch.testing.assert_close(masked.pooled[1:], model(signal[1:]).pooled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_record_does_not_depend_on_its_batch_mates(name):
    model = twins(name)[0].eval()
    signal = records(5, 12, 400).float()
    alone = model(signal[2:3]).pooled
    signal[[0, 1, 3, 4]] *= 100
    torch.testing.assert_close(model(signal).pooled[2:3], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_with_fused_norms_gives_the_same(name, dtype):
    model = twins(name)[0].eval()
    copied = fuse_norms(model)
    x = records(2, 12, 200).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for _ in range(2):
            expected, got = model(x).tokens.float(), copied(x).tokens.float()
            size = expected.abs().max().item()
            torch.testing.assert_close(
                got, expected, atol=(0.05 if dtype == torch.bfloat16 else 1e-5) * size, rtol=0
            )
        for p in model.parameters():
            p.data.mul_(1.1)  # the copy keeps its own
        torch.testing.assert_close(copied(x).tokens.float(), got)
    assert not any(p.requires_grad for p in copied.parameters())
    assert set(copied.state_dict()) == set(model.state_dict())


def test_norms_may_be_frozen_averaged_or_without_statistics():
    for change in (
        lambda norm: norm.eval(),
        lambda norm: setattr(norm, "momentum", None),
        lambda norm: (setattr(norm, "running_mean", None), setattr(norm, "running_var", None)),
    ):
        fused, plain = (module.double().train() for module in twins("resnet1d"))
        for module in (fused, plain):
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm1d):
                    change(layer)
        for seed in range(2):
            x = records(3, 12, 200, seed=seed)
            torch.testing.assert_close(fused(x).tokens, plain(x), atol=1e-8, rtol=1e-8)
        for b, c in zip(fused.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(b, c)


COMPILED = {  # one block of each kind: what compiling takes grows with the graph
    "merl_resnet18": {"widths": (8, 12), "blocks": (1, 1)},
    "xresnet1d101": {"blocks": (1, 1), "width": 32},
    "inception1d": {"depth": 3, "filters": 4, "bottleneck": 5},
    "net1d": {"widths": (32,), "blocks": (2,), "stem_width": 16},
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_training_step_compiles_whole(name):
    torch.manual_seed(0)
    fused = with_statistics(encoder(name, **COMPILED[name]))
    x = records(2, 12, 120).float()
    compiled = torch.compile(fused.train(), fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(model(x).tokens.square().sum(), list(fused.parameters()))
        for model in (compiled, fused)
    ]
    for (key, _), ours, expected in zip(fused.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4, msg=key)


def saved_bytes(run) -> int:
    """Of activations that the backward keeps, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() >= 3 and tensor.shape[0] == 2:  # the batch; weights have other sizes
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("name", "share"), [("merl_resnet18", 0.76), ("xresnet1d101", 0.52)])
def test_a_training_step_saves_less_than_the_twin(name, share):
    fused, plain = twins(name, small=False)
    x = torch.randn(2, 12, 1000)
    assert saved_bytes(lambda: fused(x).tokens) <= share * saved_bytes(lambda: plain(x))


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("xresnet1d101", "4.0.convs.0.0.weight", "4.0.convs.0.0.weight"),
        ("xresnet1d101", "4.0.convpath.0.0.0.weight", None),
        ("xresnet1d101", "5.0.idpath.1.0.weight", None),  # every stage has the same width
        ("xresnet1d101", "4.0.idpath.0.1.running_var", "4.0.idpath.0.1.running_var"),
        ("xresnet1d101", "8.4.weight", None),
        ("resnet1d_wang", "0.weight", "conv1.weight"),
        ("resnet1d_wang", "1.num_batches_tracked", "bn1.num_batches_tracked"),
        ("resnet1d_wang", "4.0.downsample.0.weight", "layer2.0.shortcut.0.weight"),
        ("resnet1d_wang", "5.0.bn2.bias", "layer3.0.bn2.bias"),
        ("resnet1d_wang", "6.2.weight", None),
        ("inception1d", "layers.0.im.3.bn_relu.0.weight", "im.3.bn_relu.0.weight"),
        ("inception1d", "layers.0.im.0.conv_bottle.1.weight", "im.0.conv_bottle.1.weight"),
        ("inception1d", "layers.0.sk.1.conv.weight", "sk.1.conv.weight"),
        ("inception1d", "layers.1.8.bias", None),
        ("merl_resnet18", "module.layer2.0.shortcut.1.weight", "layer2.0.shortcut.1.weight"),
        ("merl_resnet50", "layer4.2.conv3.weight", "layer4.2.conv3.weight"),
        ("merl_resnet50", "linear.weight", None),
        ("vit1d_tiny", "block11.attn.fn.to_qkv.bias", "block11.attn.fn.to_qkv.bias"),
        ("vit1d_tiny", "block0.attn.fn.to_out.0.weight", "block0.attn.fn.to_out.0.weight"),
        ("vit1d_tiny", "block0.ff.fn.net.3.weight", "block0.ff.fn.net.3.weight"),
        ("vit1d_tiny", "pos_embedding", "pos_embedding"),
        ("net1d", "first_conv.conv.bias", "first_conv.conv.bias"),
        ("net1d", "stage_list.6.block_list.3.se_fc2.weight", "stage_list.6.block_list.3.se_fc2.weight"),
        ("net1d", "stage_list.0.block_list.0.bn1.running_mean", None),
        ("net1d", "first_bn.weight", None),
        ("net1d", "dense.weight", None),
    ],
)
def test_published_names(name, theirs, ours):
    value = torch.zeros(1)
    renamed = published(name, {theirs: value})
    assert list(renamed) == ([] if ours is None else [ours]) or (ours is None and theirs in renamed)
    if ours is not None:
        assert ours in encoder(name).state_dict()
    elif renamed:  # passed on, so that a strict load complains
        assert theirs not in encoder(name).state_dict()


def test_masked_mean_of_nothing_is_zero():
    mean = masked_mean(torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False] * 3]))
    assert mean[1].tolist() == [0.0] * 4


def test_bad_input_is_named():
    model = encoder("resnet1d_tiny")
    with pytest.raises(EcgotError, match=r"waveform: expected \[B, 12 leads, T\], got shape \(2, 3, 100\)"):
        model(torch.randn(2, 3, 100))
    with pytest.raises(EcgotError, match=r"encoder.name: expected one of resnet1d_tiny, .*, got 'vgg'"):
        encoder("vgg")
    with pytest.raises(EcgotError, match=r"waveform: expected T of 50 to 5000, got 49"):
        encoder("vit1d_tiny")(torch.randn(1, 12, 49))


def test_torch_s_own_tools_take_an_encoder():
    model = encoder("resnet1d_tiny")
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("lengths", [torch.tensor([60.0, 60.0]), torch.tensor([60])])
def test_lengths_that_are_no_integers_of_the_batch_are_named(lengths):
    with pytest.raises(EcgotError, match=r"lengths: expected 2 integers, got "):
        encoder("resnet1d_tiny")(torch.randn(2, 12, 100), lengths)
