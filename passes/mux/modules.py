"""The modules around the core of a multiplexed network, in plain PyTorch: mixing before it, telling apart after it.

    mux     [groups * N, ..., d] -> [groups, ..., d]          demux   [groups, ..., d] -> [groups * N, ..., d]

Groups are consecutive rows. Sources: DataMUX (arXiv 2202.09318), MUX-PLM (arXiv 2302.12441). Where their code has
dropout inside these modules, there is none here; norms follow every demultiplexing layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxsparse.ops.multiplex import demux_linear, mux


class KeyMux(nn.Module):
    """1/N sum of keys[i] * x[i]: Gaussian keys of a given length, binary ones, or ones.

    Binary keys split the features into N chunks, the last one taking the rest.

    Args:
        members: N.
        dim: d.
        kind: ``gaussian``, ``binary`` or ``unit``.
        norm: length of a Gaussian key; None is sqrt(d), at which mixing keeps the scale of the features.
        learned: whether keys are trained.
    """

    def __init__(self, members: int, dim: int, kind: str, norm: float | None, learned: bool):
        super().__init__()
        self.members = members
        keys = torch.ones(members, dim)
        if kind == "gaussian":
            keys = functional.normalize(torch.randn(members, dim), dim=-1) * (math.sqrt(dim) if norm is None else norm)
        elif kind == "binary":
            owner = (torch.arange(dim) // max(dim // members, 1)).clamp(max=members - 1)
            keys = (owner == torch.arange(members)[:, None]).float()
        self.keys = nn.Parameter(keys, requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        return mux(x, self.keys, self.members)


class OrthogonalMux(nn.Module):
    """1/sqrt(N) sum of Q_i x[i] with random orthogonal Q_i, held side by side ``[d, N * d]``."""

    def __init__(self, members: int, dim: int, learned: bool):
        super().__init__()
        self.members = members
        rotations = [torch.linalg.qr(torch.randn(dim, dim))[0] for _ in range(members)]
        self.weight = nn.Parameter(torch.cat(rotations, 1), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        members = x.unflatten(0, (-1, self.members)).movedim(1, -2).flatten(-2)
        return functional.linear(members, self.weight) / math.sqrt(self.members)


class AttentionLayer(nn.Module):
    """A Transformer layer with its norms after each sublayer, over dimension -2."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.attention_norm, self.output_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2).unbind(-3)
        attended = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
        x = self.attention_norm(x + self.out(attended.transpose(-3, -2).flatten(-2)))
        return self.output_norm(x + self.down(functional.gelu(self.up(x))))


class ContextualMux(nn.Module):
    """MUX-PLM's contextual mixing: attention within each sequence, Gaussian keys, attention across a group's members
    at each position, the mean. Each of the two attention layers adds to its input.

    Attention within a sequence has the mask of the core's attention.
    """

    def __init__(self, members: int, dim: int, heads: int, is_causal: bool, norm: float | None, learned: bool):
        super().__init__()
        self.members, self.is_causal = members, is_causal
        self.within, self.across = AttentionLayer(dim, heads), AttentionLayer(dim, heads)
        keys = functional.normalize(torch.randn(members, dim), dim=-1) * (math.sqrt(dim) if norm is None else norm)
        self.keys = nn.Parameter(keys, requires_grad=learned)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.within(x, mask, self.is_causal)
        members = x.unflatten(0, (-1, self.members)).transpose(1, 2) * self.keys
        return (members + self.across(members, None, False)).mean(2)


class PrefixMux(nn.Module):
    """Lets every member start with N prefix positions, then mixes: at position i of member i stands that member's
    own vector, elsewhere the same filler. The last N positions of a sequence make room for them."""

    def __init__(self, inner: nn.Module, members: int, dim: int):
        super().__init__()
        self.inner, self.members = inner, members
        self.index, self.filler = nn.Parameter(torch.randn(members, dim)), nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        is_own = torch.eye(self.members, dtype=torch.bool, device=x.device).unsqueeze(-1)
        prefix = torch.where(is_own, self.index, self.filler)
        groups = x.shape[0] // self.members
        prefix = prefix.unsqueeze(0).expand(groups, -1, -1, -1).flatten(0, 1)
        return self.inner(torch.cat([prefix, x.narrow(1, 0, x.shape[1] - self.members)], 1))


class Repeat(nn.Module):
    """Every member gets its group's output."""

    def __init__(self, members: int):
        super().__init__()
        self.members = members

    def forward(self, h: Tensor, choice: Tensor | None = None) -> Tensor:
        return h if choice is not None else h.unsqueeze(1).expand(-1, self.members, *h.shape[1:]).flatten(0, 1)


class _Layers(nn.Module):
    """gelu, a norm, and further linear layers with gelu, norm and a skip."""

    def __init__(self, dim: int, layers: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.further = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers - 1))

    def forward(self, first: Tensor) -> Tensor:
        y: Tensor = self.norm(functional.gelu(first))
        for linear, norm in zip(self.further, self.norms, strict=True):
            y = y + norm(functional.gelu(linear(y)))
        return y


class KeyDemux(nn.Module):
    """LN(gelu(W [key_i ; h])) and further layers, shared by all members (``index_pos``, RSA).

    Args:
        members: N.
        dim: d.
        layers: linear layers, the first included.
        own_keys: learn N keys; if False each group brings keys of its own, the outputs at its prefix.
    """

    def __init__(self, members: int, dim: int, layers: int, own_keys: bool = True):
        super().__init__()
        if own_keys:
            self.keys = nn.Parameter(torch.randn(members, dim))
        self.input = nn.Linear(2 * dim, dim)
        self.layers = _Layers(dim, layers)

    def forward(self, h: Tensor, choice: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """Args:
        h: ``[groups, ..., d]``.
        choice: ``[groups, ...]``, the member to tell apart at each position; without it, all members.
        keys: ``[groups, N, d]``, the keys of each group; without them, the learned keys.
        """
        keys = self.keys if keys is None else keys
        if choice is None:
            return self.layers(demux_linear(h, keys, self.input.weight, self.input.bias))
        if keys.dim() == 2:
            chosen = keys[choice]
        else:
            chosen = keys.gather(1, choice.unsqueeze(-1).expand(-1, -1, keys.shape[-1]))
        return self.layers(self.input(torch.cat([chosen, h], -1)))


class SlotDemux(nn.Module):
    """LN_i(gelu(W_i h + b_i)): each member has an MLP of its own (DataMUX)."""

    def __init__(self, members: int, dim: int):
        super().__init__()
        self.members, self.dim = members, dim
        self.linear = nn.Linear(dim, members * dim)
        self.scale, self.shift = nn.Parameter(torch.ones(members, dim)), nn.Parameter(torch.zeros(members, dim))

    def forward(self, h: Tensor, choice: Tensor | None = None) -> Tensor:
        slots = functional.gelu(self.linear(h)).unflatten(-1, (self.members, self.dim))
        slots = functional.layer_norm(slots, (self.dim,)) * self.scale + self.shift
        if choice is None:
            return slots.movedim(-2, 1).flatten(0, 1)
        return slots.gather(-2, choice[..., None, None].expand(*choice.shape, 1, self.dim)).squeeze(-2)


class Retrieval(nn.Module):
    """Predicts the token at each position of one member: the loss that teaches a multiplexed network to keep its
    members apart. The member is drawn for every group, position and step, and a resumed training draws the same.

    Args:
        members: N.
        decoder: ``[vocabulary, d]``, the first values of the weight that scores tokens.
        ignore: token ids that are not asked for.
        lost: positions at the end of a sequence that take no part.
    """

    def __init__(self, members: int, decoder: Tensor, ignore: tuple[int, ...], lost: int = 0):
        super().__init__()
        self.members, self.ignore, self.lost = members, ignore, lost
        self.weight = nn.Parameter(decoder.detach().clone())
        self.bias = nn.Parameter(torch.zeros(decoder.shape[0]))

    def draw(self, h: Tensor, step: Tensor) -> Tensor:
        """The members to ask for, int64 ``[groups, length]``: a hash of step, group and position."""
        group = torch.arange(h.shape[0], device=h.device).unsqueeze(1)
        position = torch.arange(h.shape[1], device=h.device)
        mixed = group * 73856093 ^ position * 19349663 ^ step * 83492791
        mixed = (mixed ^ (mixed >> 13)) * 1274126177 & 0x7FFFFFFF
        return (mixed ^ (mixed >> 16)) % self.members

    def forward(self, told_apart: Tensor, ids: Tensor, choice: Tensor) -> Tensor:
        """Args:
        told_apart: ``[groups, length, d]``, of the chosen members.
        ids: the tokens of all members, ``[groups * N, length]``.
        choice: the members, as :meth:`draw` returns them.
        """
        target = ids.unflatten(0, (-1, self.members)).gather(1, choice.unsqueeze(1)).squeeze(1)
        for token in self.ignore:
            target = target.masked_fill(target == token, -100)
        if self.lost:
            target = functional.pad(target[:, : -self.lost], (0, self.lost), value=-100)
        scores = functional.linear(told_apart, self.weight, self.bias)
        total = functional.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="sum")
        return total / (target != -100).sum().clamp(min=1)


class Multiplexer(nn.Module):
    """The parts of a multiplexed network, in one place for their state."""

    def __init__(self, mux: nn.Module, demux: nn.Module, retrieval: Retrieval | None):
        super().__init__()
        self.mux, self.demux, self.retrieval = mux, demux, retrieval


class RetrievalLoss(nn.Module):
    """The retrieval loss of a batch from the core's output, a scalar."""

    def __init__(self, demux: nn.Module, retrieval: Retrieval):
        super().__init__()
        self.demux, self.retrieval = demux, retrieval

    def forward(self, h: Tensor, ids: Tensor, step: Tensor, *keys: Tensor) -> Tensor:
        choice = self.retrieval.draw(h, step)
        loss: Tensor = self.retrieval(self.demux(h, choice, *keys), ids, choice)
        return loss
