"""A tiny language model without dropout, every recipe that trains on it, and the loop that trains it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

import fxsparse
from fxsparse.passes import DistillLayers

VOCABULARY, DIM, TOKENS = 20, 16, 6
TOTAL = 20
"""Optimizer steps of a whole training."""


class Block(nn.Module):
    """Attention of four heads in two groups, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.q, self.v, self.o = nn.Linear(DIM, DIM), nn.Linear(DIM, 8), nn.Linear(DIM, DIM)
        self.k = nn.Linear(DIM, 8, bias=False)  # a bias would have the gradient 0 but for rounding
        self.gate, self.up, self.down = nn.Linear(DIM, 32), nn.Linear(DIM, 32), nn.Linear(32, DIM)

    def forward(self, x: Tensor) -> Tensor:
        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.view(x.shape[0], x.shape[1], heads, 4).transpose(1, 2)

        y = self.attention_norm(x)
        key, value = (split(part(y), 2).repeat_interleave(2, 1) for part in (self.k, self.v))
        attended = scaled_dot_product_attention(split(self.q(y), 4), key, value, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], DIM))
        y = self.mlp_norm(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


class Language(nn.Module):
    """Embedding, blocks, norm and head; the loss is the mean over all tokens of the batch."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def language() -> Language:
    torch.manual_seed(0)
    return Language()


@functools.cache
def _traced() -> GraphModule:
    return fxsparse.trace(language(), kwargs=batch(1))


@functools.cache
def _teacher() -> GraphModule:
    torch.manual_seed(1)
    return fxsparse.trace(Language(), kwargs=batch(1))


@dataclass(frozen=True)
class Recipe:
    """Passes for `Language`.

    Attributes:
        passes: made anew for every model.
        gated: whether its loss has the sparsity loss of gates.
        waits: whether parameters have no gradient in some steps, so that DistributedDataParallel must look for them.
        by_batch: whether it draws or chooses for each batch, so that parts of a batch are not trained like the whole.
    """

    passes: Callable[[], list[Any]]
    gated: bool = False
    waits: bool = False
    by_batch: bool = False

    def rewrite(self) -> GraphModule:
        return fxsparse.rewrite(copy.deepcopy(_traced()), self.passes())


def _of(*texts: Any, **flags: bool) -> Recipe:
    return Recipe(lambda: [text() if callable(text) else text for text in texts], **flags)


def _distill(**options: Any) -> Callable[[], DistillLayers]:
    return lambda: DistillLayers(_teacher(), weights=(1.0, 0.5, 0.5), projection="shared", **options)


RECIPES = {
    "branches": _of("nm-masks{keep_first=false},double-prune{every=3},low-rank{rank=2,start=0.5}", waits=True),
    "dense-branches": _of('low-rank{rank=2,start=0.5,layers=["*.q","*.down"]}', waits=True),
    "double-prune": _of("nm-masks{pattern=2:4,storage=masked},double-prune{every=1}"),
    "sr-ste": _of("nm-masks{storage=masked,dynamic=true,every=2,decay=0.01}"),
    "gates": _of("gates{target=0.5,every=4,units=[heads,attention,intermediate,ffn,hidden]}", gated=True),
    "gates-projected": _of("gates{target=0.5,every=4,constraint=projection}", gated=True),
    "dims": _of("drop-dims{fraction=0.5,every=3,units=[hidden,intermediate,heads]}"),
    "tensors": _of("select-tensors{rho=0.7,every=4}", waits=True),
    "tensors-branches": _of("nm-masks,low-rank{rank=2,start=0.5},select-tensors{rho=0.8,every=4}", waits=True),
    "neurons": _of("select-neurons{omission=0.5,multiple=4,score=weighted,choice=sampled,rungs=2,rung_steps=4}"),
    "neurons-top": _of("select-neurons{omission=0.5,multiple=4,choice=top,every=2}"),
    "neurons-branches": _of('low-rank{rank=2,start=0.5,layers=["*.up"]},select-neurons{multiple=4}', waits=True),
    "mux": _of("multiplex{n=2}"),
    "mux-stages": _of("multiplex{n=2,stages=[[0.3,0,1],[1,0.9,0.1]]}", by_batch=True),
    "distill": _of("drop-layers{count=1}", _distill(matching="plain", teacher_layers=(0, 2))),
    "distill-dynamic": _of("drop-layers{count=1}", _distill(), by_batch=True),
    "gates-distill": _of("gates{target=0.4,every=4}", _distill(matching="plain", teacher_layers=(0, 1, 2)), gated=True),
    "nm": _of("nm-masks{keep_first=false}"),
    "dropped": _of("drop-layers{indices=[1]}"),
}


def batch(step: int, rows: int = 8) -> dict[str, Tensor]:
    """The batch of an optimizer step, the same on every rank."""
    ids = torch.randint(VOCABULARY, (rows, TOKENS + 1), generator=torch.Generator().manual_seed(step))
    return {"ids": ids[:, :-1], "labels": ids[:, 1:]}


def loss_of(recipe: Recipe, model: nn.Module, gm: GraphModule, inputs: dict[str, Tensor]) -> Tensor:
    loss = model(**inputs)["loss"]
    return loss + fxsparse.sparsity_loss(gm) if recipe.gated else loss


@dataclass
class Training:
    """A rewritten model and what trains it."""

    recipe: Recipe
    gm: GraphModule
    optimizer: torch.optim.Optimizer
    scheduler: Any
    schedule: fxsparse.Schedule | None = None

    @classmethod
    def start(cls, recipe: Recipe, gm: GraphModule | None = None) -> Training:
        gm = recipe.rewrite() if gm is None else gm
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 4))
        return cls(recipe, gm, optimizer, scheduler)

    def build_schedule(self) -> None:
        self.schedule = fxsparse.Schedule(self.gm, self.optimizer, total_steps=TOTAL)

    def parts(self) -> dict[str, Any]:
        return {
            "model": self.gm,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "schedule": self.schedule,
        }

    def state(self) -> dict[str, Any]:
        return {name: copy.deepcopy(part.state_dict()) for name, part in self.parts().items()}

    def run(self, last: int) -> list[float]:
        """Trains until optimizer step ``last``; returns the losses."""
        assert self.schedule is not None
        losses = []
        while self.schedule.steps_done < last:
            step = self.schedule.steps_done + 1
            torch.manual_seed(step)
            inputs = batch(step)
            self.schedule.observe(inputs)
            loss = loss_of(self.recipe, self.gm, self.gm, inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.gm.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            losses.append(loss.item())
        return losses
