"""Random small models: what a model can be made of, drawn by hypothesis, built in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse

VOCABULARY = 24
FEATURES = 12
CLASSES = 10

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "squared relu": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Spec:
    """A model and how it is fed; the defaults are the simplest one, which shrinking ends at.

    Attributes:
        inputs: token ids through an embedding, or features through a linear.
        blocks: their number; ``repeats`` of them are the same module.
        heads, groups, head: query heads, key heads and the size of one; the hidden size is ``heads * head``.
        channels: of an MLP; 0 is a model without MLPs.
        attention: how it is computed; ``mha`` is ``nn.MultiheadAttention``, ``packed`` one linear for all three.
        head_of: the last linear: its own weight, the embedding's, or none.
        sharing: ``blocks`` is one module at all places, ``weights`` one weight in the MLPs of all blocks.
        flat: whether all parameters are slices of one buffer.
        dtype: of the MLPs; the rest is float32.
        frozen: what requires no gradient.
        outputs: what is returned.
    """

    inputs: Literal["tokens", "features"] = "tokens"
    blocks: int = 1
    heads: int = 2
    groups: int = 2
    head: int = 4
    channels: int = 16
    gated: bool = False
    activation: str = "gelu"
    attention: Literal["sdpa", "manual", "packed", "mha", "none"] = "sdpa"
    causal: bool = False
    norm: Literal["layer", "rms", "own", "none"] = "layer"
    after: bool = False
    bias: bool = True
    positions: bool = False
    head_of: Literal["own", "embedding", "none"] = "own"
    sharing: Literal["none", "blocks", "weights"] = "none"
    flat: bool = False
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    frozen: Literal["none", "embedding", "first", "norms", "all but head"] = "none"
    outputs: Literal["loss", "logits", "several", "tuple"] = "loss"
    dropout: float = 0.0

    @property
    def hidden(self) -> int:
        return self.heads * self.head

    def __repr__(self) -> str:
        """What differs from the defaults."""
        differ = (field for field in fields(self) if getattr(self, field.name) != field.default)
        return f"Spec({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in differ)})"


def _mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    """The usual value in three of four cases: all at once, rare ones would leave few models that plain torch covers."""
    return st.sampled_from([usual] * 3 * len(others) + list(others))


@st.composite
def specs(draw: Callable[[Any], Any]) -> Spec:
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    attention = draw(st.sampled_from(["sdpa", "sdpa", "manual", "packed", "mha", "none"]))
    inputs = draw(st.sampled_from(["tokens", "features"]))
    return Spec(
        inputs=inputs,
        blocks=draw(st.integers(1, 3)),
        heads=heads,
        groups=heads
        if attention == "mha"
        else draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        head=draw(st.sampled_from([4, 8, 5])),
        channels=draw(st.sampled_from([16, 24, 12, 7, 0] if attention != "none" else [16, 24, 12, 7])),
        gated=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        attention=attention,
        causal=draw(st.booleans()),
        norm=draw(st.sampled_from(["layer", "rms", "own", "none"])),
        after=draw(st.booleans()),
        bias=draw(st.booleans()),
        positions=draw(st.booleans()),
        head_of=draw(st.sampled_from(["own", "none", *(["embedding"] if inputs == "tokens" else [])])),
        sharing=draw(_mostly("none", "blocks", "weights")),
        flat=draw(_mostly(False, True)),
        dtype=draw(_mostly("float32", "bfloat16", "float64")),
        frozen=draw(_mostly("none", "embedding", "first", "norms", "all but head")),
        outputs=draw(st.sampled_from(["loss", "loss", "logits", "several", "tuple"])),
        dropout=draw(_mostly(0.0, 0.1)),
    )


class OwnNorm(nn.Module):
    """RMSNorm spelled out, as models of transformers do."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def norm_of(spec: Spec) -> nn.Module:
    kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "own": OwnNorm}
    return kinds[spec.norm](spec.hidden) if spec.norm != "none" else nn.Identity()


class Attention(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.spec, keys = spec, spec.groups * spec.head
        if spec.attention == "mha":
            self.inner = nn.MultiheadAttention(spec.hidden, spec.heads, bias=spec.bias, batch_first=True)
        elif spec.attention == "packed":
            self.qkv = nn.Linear(spec.hidden, spec.hidden + 2 * keys, bias=spec.bias)
        else:
            self.q = nn.Linear(spec.hidden, spec.hidden, bias=spec.bias)
            self.k = nn.Linear(spec.hidden, keys, bias=spec.bias)
            self.v = nn.Linear(spec.hidden, keys, bias=spec.bias)
        if spec.attention != "mha":
            self.o = nn.Linear(spec.hidden, spec.hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        spec, length = self.spec, x.shape[1]
        if spec.attention == "mha":
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1) if spec.causal else None
            return self.inner(x, x, x, attn_mask=hidden, need_weights=False)[0]
        keys = spec.groups * spec.head
        q, k, v = self.qkv(x).split([spec.hidden, keys, keys], -1) if spec.attention == "packed" else (
            self.q(x), self.k(x), self.v(x)
        )  # fmt: skip
        q, k, v = (part.unflatten(-1, (-1, spec.head)).transpose(1, 2) for part in (q, k, v))
        if spec.groups != spec.heads:
            k, v = (part.repeat_interleave(spec.heads // spec.groups, dim=1) for part in (k, v))
        if spec.attention == "manual":
            scores = q @ k.transpose(-1, -2) / spec.head**0.5
            if spec.causal:
                scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=spec.causal)
        return self.o(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.dtype = getattr(torch, spec.dtype)
        self.up = nn.Linear(spec.hidden, spec.channels, bias=spec.bias, dtype=self.dtype)
        self.gate = nn.Linear(spec.hidden, spec.channels, bias=spec.bias, dtype=self.dtype) if spec.gated else None
        self.down = nn.Linear(spec.channels, spec.hidden, bias=spec.bias, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        inner = x.to(self.dtype)
        h = self.up(inner) if self.gate is None else self.up(inner) * self.activation(self.gate(inner))
        return self.down(self.activation(h) if self.gate is None else h).to(x.dtype)


class Block(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.after, self.dropout = spec.after, nn.Dropout(spec.dropout)
        self.attention = Attention(spec) if spec.attention != "none" else None
        self.mlp = MLP(spec) if spec.channels else None
        self.norm1, self.norm2 = norm_of(spec), norm_of(spec)

    def forward(self, x: Tensor) -> Tensor:
        for norm, inner in ((self.norm1, self.attention), (self.norm2, self.mlp)):
            if inner is not None:
                x = norm(x + self.dropout(inner(x))) if self.after else x + self.dropout(inner(norm(x)))
        return x


class Model(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        if spec.inputs == "tokens":
            self.embedding: nn.Module = nn.Embedding(VOCABULARY, spec.hidden)
        else:
            self.embedding = nn.Linear(FEATURES, spec.hidden, bias=spec.bias)
        self.positions = nn.Embedding(32, spec.hidden) if spec.positions else None
        if spec.sharing == "blocks":
            self.blocks = nn.ModuleList([Block(spec)] * spec.blocks)
        else:
            self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.blocks))
        self.norm = norm_of(spec)
        self.head: nn.Module = nn.Identity()
        if spec.head_of != "none":
            classes = VOCABULARY if spec.head_of == "embedding" else CLASSES
            self.head = nn.Linear(spec.hidden, classes, bias=spec.bias)
        if spec.head_of == "embedding":
            self.head.weight = self.embedding.weight
        if spec.sharing == "weights" and spec.channels:
            for block in self.blocks[1:]:
                block.mlp.up.weight = self.blocks[0].mlp.up.weight

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        h = self.embedding(x)
        if self.positions is not None:
            h = h + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        logits = self.head(h)
        if self.spec.outputs == "logits":
            return logits
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        if self.spec.outputs == "tuple":
            return loss, logits
        states = {"states": (h, h.mean(1))} if self.spec.outputs == "several" else {}
        return {"loss": loss, "logits": logits, **states}


def loss_and_logits(spec: Spec, output: Any) -> tuple[Tensor, Tensor]:
    """The loss, one of our own where the model returns none, and the logits."""
    if spec.outputs == "logits":
        return output.float().square().mean(), output
    return output if spec.outputs == "tuple" else (output["loss"], output["logits"])


def build(spec: Spec, seed: int = 0) -> Model:
    """The model in training mode, seeded, its norms and biases away from ones and zeros."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Model(spec)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    _freeze(model)
    if spec.flat:
        _flatten(model)
    return model.train()


def _freeze(model: Model) -> None:
    kinds: dict[str, Callable[[str], bool]] = {
        "none": lambda name: False,
        "embedding": lambda name: name.startswith("embedding"),
        "first": lambda name: name.startswith("blocks.0."),
        "norms": lambda name: "norm" in name,
        "all but head": lambda name: not name.startswith(("head", "blocks.0.mlp.down")),
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not kinds[model.spec.frozen](name))


@torch.no_grad()
def _flatten(model: nn.Module) -> None:
    """Makes all parameters of a dtype slices of one buffer, as distributed optimizers do."""
    for dtype in {parameter.dtype for parameter in model.parameters()}:
        every = [parameter for parameter in model.parameters() if parameter.dtype == dtype]
        buffer = torch.cat([parameter.flatten() for parameter in every])
        for parameter, part in zip(every, buffer.split([parameter.numel() for parameter in every]), strict=True):
            parameter.data = part.view(parameter.shape)


def batch_of(spec: Spec, rows: int = 3, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = {"own": CLASSES, "embedding": VOCABULARY, "none": spec.hidden}[spec.head_of]
    if spec.inputs == "tokens":
        x = torch.randint(VOCABULARY, (rows, length), generator=generator)
    else:
        x = torch.randn(rows, length, FEATURES, generator=generator)
    return {"x": x, "labels": torch.randint(classes, (rows, length), generator=generator)}


@functools.lru_cache(maxsize=32)
def traced(spec: Spec) -> tuple[Model, GraphModule]:
    """A model and its graph; both are left as they are."""
    model = build(spec)
    return model, fxsparse.trace(model, kwargs=batch_of(spec))
