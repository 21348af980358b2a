"""A small Llama-style decoder in plain torch, for inference alone.

It computes what transformers' ``LlamaForCausalLM`` does with the weights of a decoder from scratch (see
:func:`ecgot.models.language_models.build_reporter`), loads in no time, and lets the beams of a record share
one cache: the ECG's keys and values are kept once for all of them, and what the beams have written is kept
as a tree, in which a beam sees its own branch. Nothing is copied when beams split or die.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.errors import EcgotError, first_line

# Weights of a block and those of transformers' that they are made of, one below the other.
_PARTS = {
    "norm_in": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "norm_mid": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_BLOCK = 16  # tokens that a cache grows by


@dataclass(frozen=True)
class DecoderShape:
    """The size of a decoder and its special tokens.

    Attributes:
        vocabulary: V. width: W. hidden: channels within the feed-forward part. layers: L. heads: H.
        theta: base of the rotary embeddings' wavelengths.
        norm_eps: added to a mean square before its root is taken.
        bos_id, eos_id: tokens that begin and end a text.
    """

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    theta: float
    norm_eps: float
    bos_id: int
    eos_id: int


def read_shape(folder: Path) -> DecoderShape:
    """The shape of a decoder from scratch, from the config.json that transformers wrote.

    Raises:
        EcgotError: there is none, or it is of another kind of model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_kind(config)
        return DecoderShape(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            hidden=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            theta=config["rope_parameters"]["rope_theta"],
            norm_eps=config["rms_norm_eps"],
            bos_id=config["bos_token_id"],
            eos_id=config["eos_token_id"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EcgotError(
            f"run: expected a language model in {folder}, got none ({first_line(error)})"
        ) from error


def _check_kind(config: dict[str, Any]) -> None:
    """Raise ValueError unless :class:`Decoder` computes what the configuration says."""
    wanted = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
    }
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, got {config[name]}")
    kind = config["rope_parameters"]["rope_type"]
    if kind != "default":
        raise ValueError(f"rope_type: expected default, got {kind}")


class Cache:
    """Keys and values of b records, each with K beams that share them.

    Attributes:
        visible: [b, K, S] bool, which of the S places a beam sees.
        position: [b], of the next token.
    """

    def __init__(self, stored: Tensor, mask: Tensor, beams: int) -> None:
        """Of a prefix: stored [b, L, 2, H, S, d] with mask [b, S]."""
        self._stored, self._used = stored, stored.shape[4]
        self._beams = beams
        self.visible = mask.bool()[:, None].expand(-1, beams, -1)
        self.position = mask.sum(1)
        self._own = torch.eye(beams, dtype=torch.bool, device=mask.device)

    def extend(self, parent: Tensor) -> Tensor:
        """Room for a token of each beam, whose beam before was ``parent`` [b, K]: [b, L, 2, H, S + K, d].

        The last K places are to be filled.
        """
        index = parent[:, :, None].expand(-1, -1, self.visible.shape[2])
        own = self._own.expand(len(parent), -1, -1)
        self.visible = torch.cat([self.visible.gather(1, index), own], 2)
        self._used += self._beams
        if self._used > self._stored.shape[4]:
            self._stored = F.pad(self._stored, (0, 0, 0, _BLOCK * self._beams))
        return self._stored[..., : self._used, :]

    def keep(self, order: Tensor) -> None:
        """Keep only the records ``order`` [count], in this order; those that stay in place cost nothing."""
        moved = order != torch.arange(len(order), device=order.device)
        stored = self._stored[..., : self._used, :]
        stored[: len(order)][moved] = stored[order[moved]]
        self._stored = self._stored[: len(order)]
        self.visible, self.position = self.visible[order], self.position[order]


class _Block(nn.Module):
    """Attention and a gated feed-forward part, each behind a norm and beside a residual."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norm_in = nn.RMSNorm(width, shape.norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mid = nn.RMSNorm(width, shape.norm_eps)
        self.gate_up = nn.Linear(width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, stored: Tensor, mask: Tensor) -> Tensor:
        """The last q of Q positions x [b, Q, W], which go on.

        Args:
            rotation: of all Q, see :func:`_rotated`.
            stored: [b, 2, H, S, d], keys and values; the last Q places are filled here.
            mask: [b, 1, q, S] bool, True at places that a position sees.
        """
        count = x.shape[1]
        query, key, value = self.qkv(self.norm_in(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        stored[:, 0, :, -count:] = _rotated(key, rotation)
        stored[:, 1, :, -count:] = value
        on = mask.shape[2]
        query, x = _rotated(query[:, :, -on:], rotation[..., -on:, :]), x[:, -on:]
        seen = F.scaled_dot_product_attention(query, stored[:, 0], stored[:, 1], attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_mid(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding of x [b, H, Q, d]; rotation [2, b, 1, Q, d / 2] holds cosines and sines."""
    first, second = x.chunk(2, -1)
    cosine, sine = rotation
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class Decoder(nn.Module):
    """The decoder; its state dict may be transformers', or one it gave out itself.

    Args:
        shape: its size.
    """

    frequency: Tensor

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, shape.norm_eps)
        head_width = shape.width // shape.heads
        exponent = torch.arange(0, head_width, 2, dtype=torch.float) / head_width
        self.register_buffer("frequency", 1 / shape.theta**exponent, persistent=False)
        self.register_load_state_dict_pre_hook(_join_parts)

    def read(self, prefix: Tensor, mask: Tensor, *, beams: int) -> tuple[Tensor, Cache]:
        """Log-probabilities [b, V] of what follows a prefix [b, P, W] with mask [b, P], and a cache."""
        last, stored = self._pass(prefix, mask, 1)
        return self._log_probability(last[:, 0]), Cache(stored, mask, beams)

    def step(self, tokens: Tensor, parent: Tensor, cache: Cache) -> Tensor:
        """Log-probabilities [b, K, V] of what follows ``tokens`` [b, K], the next of the beams ``parent``."""
        stored = cache.extend(parent)
        rotation = self._rotation(cache.position[:, None])
        x, mask = self.embed_tokens(tokens), cache.visible[:, None]
        for number, layer in enumerate(self.layers):
            x = layer(x, rotation, stored[:, number], mask)
        cache.position = cache.position + 1
        return self._log_probability(x)

    def log_probability_of(self, prefix: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability [b, S] of each of the tokens [b, S] after a prefix [b, P, W] with mask [b, P]."""
        embedded = torch.cat([prefix, self.embed_tokens(tokens)], 1)
        whole = torch.cat([mask, torch.ones_like(tokens)], 1)
        count = tokens.shape[1]
        known = self._log_probability(self._pass(embedded, whole, count + 1)[0][:, :-1])
        return known.gather(2, tokens[:, :, None]).squeeze(2)

    def _pass(self, x: Tensor, mask: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """The last positions of x [b, P, W] with mask [b, P], and the keys and values of all."""
        b, count, width = x.shape
        heads = self.shape.heads
        rotation = self._rotation((mask.cumsum(1) - 1).clamp_min(0))
        stored = x.new_empty(b, self.shape.layers, 2, heads, count, width // heads)
        lower = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
        # Padding sees itself: a mean of nothing is NaN.
        own = torch.eye(count, dtype=torch.bool, device=x.device)
        visible = (lower & mask.bool()[:, None] | own)[:, None]
        for number, layer in enumerate(self.layers):
            # Of the last block only these positions are asked.
            on = last if number == len(self.layers) - 1 else count
            x = layer(x, rotation, stored[:, number], visible[:, :, -on:])
        return x, stored

    def _rotation(self, position: Tensor) -> Tensor:
        angle = (position[:, :, None] * self.frequency)[:, None]
        return torch.stack([angle.cos(), angle.sin()])

    def _log_probability(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embed_tokens.weight).log_softmax(-1)


def _join_parts(module: nn.Module, state: dict[str, Tensor], prefix: str, *_others: Any) -> None:
    """Turn transformers' names into this module's."""
    outer = f"{prefix}model."
    for name in [name for name in state if name.startswith(outer)]:
        state[prefix + name.removeprefix(outer)] = state.pop(name)
    for number in range(len(module.layers)):  # type: ignore[arg-type]
        for name, parts in _PARTS.items():
            block = f"{prefix}layers.{number}."
            names = [f"{block}{part}.weight" for part in parts]
            if all(each in state for each in names):  # if not, loading names what is missing
                state[f"{block}{name}.weight"] = torch.cat([state.pop(each) for each in names])
