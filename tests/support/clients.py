"""The table of clients and recipes in ``docs/clients.md``, and what its tests share.

A test of a client is parametrised by `cells` with the client's row; ``yes`` must work and equal `by_hand`, and any
other cell must be refused with the words that the page gives for it. `TESTED_IN` says where each row is tested.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.passes import DistillLayers

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"

RECIPES: dict[str, str] = {
    "static N:M": "nm-masks",
    "SR-STE": "nm-masks{storage=masked,dynamic=true,every=2}",
    "double-prune": "nm-masks,double-prune{every=2}",
    "low-rank": "nm-masks,double-prune,low-rank{rank=2,start=0.5}",
    "gates": "gates{target=0.5}",
    "dimensions": "drop-dims{fraction=0.5,every=1}",
    "tensors": "select-tensors{rho=0.7,every=3}",
    "neurons": "select-neurons{omission=0.5,multiple=16,rungs=1}",
    "mux": "multiplex{n=2}",
    "distill": "drop-layers{indices=[1]}",
    "drop-layers": "drop-layers{indices=[0]}",
}
"""Pipelines by the heading of their column; ``distill`` adds a teacher."""

TESTED_IN: dict[str, str] = {
    "Trainer": "tests/integrations/test_clients.py",
    "Trainer, callback": "tests/integrations/test_clients.py",
    "accelerate": "tests/integrations/test_clients.py",
    "Lightning": "tests/integrations/test_clients.py",
    "PEFT": "tests/modules/test_clients.py",
    "DDP": "tests/integrations/test_distributed.py",
    "FSDP2": "tests/integrations/test_distributed.py",
    "FSDP2, module": "tests/integrations/test_distributed.py",
    "DCP": "tests/integrations/test_distributed.py",
    "compile": "tests/integrations/test_compiled_training.py",
    "compile, whole step": "tests/integrations/test_compiled_training.py",
    "compile, max-autotune": "tests/integrations/test_compiled_training.py",
    "compile, reduce-overhead": "tests/integrations/test_compiled_training.py",
}
"""The file that tests each row of the table."""

WHOLE_MATRIX = os.environ.get("FXSPARSE_WHOLE_MATRIX") == "1"
"""Every recipe under every client, instead of a sample."""

STEPS, ACCUMULATE, CLIP, RATE = 4, 2, 0.5, 1e-2


def table() -> dict[str, dict[str, str]]:
    """The cells of the page, by client and recipe."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(heading[1:], row[1:], strict=True)) for row in rows}


def reasons() -> dict[str, str]:
    """The words of each refusal, by its letter."""
    return dict(re.findall(r"^- (\w+): `([^`]+)`", PAGE.read_text(), re.MULTILINE))


def cells(client: str, sample: Sequence[str] | None = None) -> list[Any]:
    """Parameters ``recipe, reason`` for every cell of a row; the reason is None where the cell says ``yes``.

    ``sample`` names the recipes that always run; the others, and those that were not run yet (``?``), run if
    ``FXSPARSE_WHOLE_MATRIX=1`` is set.
    """
    row, words = table()[client], reasons()
    return [
        pytest.param(recipe, None if cell in {"yes", "?"} else words[cell], id=recipe)
        for recipe, cell in row.items()
        if WHOLE_MATRIX or (cell != "?" and (sample is None or recipe in sample))
    ]


def llama(layers: int = 2) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def make_batch(rows: int = 4, tokens: int = 8) -> dict[str, Tensor]:
    """Fresh token ids and labels ``[rows, tokens]``."""
    return {name: torch.randint(64, (rows, tokens)) for name in ("input_ids", "labels")}


@functools.cache
def _base() -> GraphModule:
    return fxsparse.trace(llama(), kwargs=make_batch())


@functools.cache
def _rewritten(recipe: str) -> GraphModule:
    passes: list[Any] = [RECIPES[recipe]]
    if recipe == "distill":
        passes.append(DistillLayers(llama(3), weights=(0.5, 0.1, 0.4)))
    return fxsparse.rewrite(copy.deepcopy(_base()), passes)


def rewritten(recipe: str) -> GraphModule:
    """A rewritten Llama of its own, the same on every call."""
    return copy.deepcopy(_rewritten(recipe))


def batches(rows: int = 4) -> list[dict[str, Tensor]]:
    """The micro-batches of a whole training, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (STEPS * ACCUMULATE, 2, rows, 8), generator=generator)
    return [{"input_ids": one, "labels": other} for one, other in ids]


def seed(step: int) -> None:
    """Called before optimizer step ``step``, from 1, so that loops draw alike whatever they draw in between."""
    torch.manual_seed(100 + step)


def optimizer_step(
    gm: nn.Module, run: Callable[..., Any], optimizer: torch.optim.Optimizer, micro: Sequence[Any], autocast: bool
) -> Tensor:
    """One step on the micro-batches, with clipped gradients and the sparsity loss of gates; returns the loss."""
    total = torch.zeros(())
    for batch in micro:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(**batch).loss
        loss = loss.float() / ACCUMULATE
        loss.backward()
        total = total + loss.detach()
    nn.utils.clip_grad_norm_(gm.parameters(), CLIP)
    if has_gates(gm):
        fxsparse.sparsity_loss(gm).backward()
    optimizer.step()
    return total


def by_hand(
    gm: GraphModule,
    autocast: bool = True,
    *,
    run: Callable[..., Any] | None = None,
    step_of: Callable[..., Tensor] = optimizer_step,
) -> list[float]:
    """Trains by a loop of plain torch: accumulation, bf16, clipping, the schedule, and the sparsity loss of gates.

    Args:
        gm: the rewritten model.
        autocast: whether in bf16.
        run: what is called in the place of ``gm``, such as its compiled form.
        step_of: what makes a step, `optimizer_step` or its compiled form.

    Returns:
        the losses of the steps.
    """
    gm.train()
    optimizer = torch.optim.AdamW(gm.parameters(), lr=RATE, weight_decay=0.0)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=STEPS)
    losses = []
    data = batches()
    for step in range(STEPS):
        seed(step + 1)
        micro = data[step * ACCUMULATE : (step + 1) * ACCUMULATE]
        schedule.observe(micro[0])
        losses.append(float(step_of(gm, gm if run is None else run, optimizer, micro, autocast)))
        schedule.step()
        optimizer.zero_grad()
    schedule.remove()
    return losses


def has_gates(gm: nn.Module) -> bool:
    """Whether a model has gates that learn."""
    return any(name.startswith("sparsity.") for name, _ in gm.named_parameters())


def assert_equal_state(gm: nn.Module, expected: nn.Module) -> None:
    """Asserts that parameters and buffers are equal bit for bit, and that training moved them."""
    state, wanted = gm.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    different = [name for name, tensor in state.items() if not torch.equal(tensor, wanted[name])]
    assert not different, different


def assert_moved(gm: nn.Module, recipe: str) -> None:
    """Asserts that training changed parameters of ``gm``."""
    before = _rewritten(recipe).state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


def refused_or(reason: str | None, run: Callable[[], Any]) -> bool:
    """Runs what a cell promises; whether it ran and was not, as promised, refused with these words."""
    if reason is None:
        run()
        return True
    with pytest.raises(fxsparse.FxsparseError, match=re.escape(reason)):
        run()
    return False


def names(items: Iterable[Any]) -> list[str]:
    """The recipes of parameters made by `cells`."""
    return [item.values[0] for item in items]
