"""Multiplexing by hand, to hold rewritten graphs against: the original model, its parts called one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm


def filled(rows: Tensor, n: int) -> Tensor:
    """Rows up to the next multiple of ``n``, taken from the start."""
    return torch.cat([rows] * n)[: -(-len(rows) // n) * n]


def mixed(rows: Tensor, keys: Tensor) -> Tensor:
    n = len(keys)
    groups = [sum(keys[i] * rows[g * n + i] for i in range(n)) / n for g in range(len(rows) // n)]
    return torch.stack(groups)


def told_apart(h: Tensor, state: Mapping[str, Tensor], layers: int = 2, keys: Tensor | None = None) -> Tensor:
    """LN(gelu(W [key ; h])) and further layers with a skip, member by member."""
    own = state["demux.keys"] if keys is None else keys
    rows = []
    for group, hidden in enumerate(h):
        for key in own if keys is None else own[group]:
            joined = torch.cat([key.expand(*hidden.shape[:-1], -1), hidden], -1)
            y = joined @ state["demux.input.weight"].t() + state["demux.input.bias"]
            y = norm(gelu(y), state, "demux.layers.norm")
            for layer in range(layers - 1):
                name = f"demux.layers.further.{layer}"
                z = gelu(y @ state[f"{name}.weight"].t() + state[f"{name}.bias"])
                y = y + norm(z, state, f"demux.layers.norms.{layer}")
            rows.append(y)
    return torch.stack(rows)


def norm(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def bert(model: nn.Module, state: Mapping[str, Tensor], n: int, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and logits of a multiplexed BERT classifier in evaluation mode."""
    rows = len(batch["input_ids"])
    x = filled(model.bert.embeddings(batch["input_ids"]), n)
    seen = filled(batch["attention_mask"].bool(), n).unflatten(0, (-1, n)).any(1)
    h = mixed(x, state["mux.keys"])
    for layer in model.bert.encoder.layer:
        h = first(layer(h, seen[:, None, None, :].expand(-1, 1, h.shape[1], -1)))
    apart = told_apart(h, state)[:rows]
    logits = model.classifier(model.bert.pooler(apart))
    return cross_entropy(logits, batch["labels"]), logits


def opt(model: nn.Module, state: Mapping[str, Tensor], n: int, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and logits of a multiplexed OPT in evaluation mode."""
    ids = batch["input_ids"]
    decoder = model.model.decoder
    positions = decoder.embed_positions.weight[2 : 2 + ids.shape[1]]
    x = filled(decoder.embed_tokens(ids) + positions, n)
    apart = told_apart(run_opt(decoder, mixed(x, state["mux.keys"])), state)[: len(ids)]
    return opt_head(model, apart, batch["labels"])


def opt_with_prefix(
    model: nn.Module, state: Mapping[str, Tensor], n: int, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"]
    decoder, length = model.model.decoder, ids.shape[1]
    x = filled(decoder.embed_tokens(ids) + decoder.embed_positions.weight[2 : 2 + length], n)
    rows = []
    for place, row in enumerate(x):
        prefix = state["mux.filler"].repeat(n, 1)
        prefix[place % n] = state["mux.index"][place % n]
        rows.append(torch.cat([prefix, row[: length - n]]))
    h = run_opt(decoder, mixed(torch.stack(rows), state["mux.inner.keys"]))
    rest = torch.cat([h[:, n:], torch.zeros_like(h[:, :n])], 1)
    return opt_head(model, told_apart(rest, state, keys=h[:, :n])[: len(ids)], batch["labels"])


def run_opt(decoder: nn.Module, h: Tensor) -> Tensor:
    for layer in decoder.layers:
        h = first(layer(h, attention_mask=None))
    return h


def opt_head(model: nn.Module, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model.lm_head(model.model.decoder.final_layer_norm(h))
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


ORACLES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"bert": bert, "opt": opt}
