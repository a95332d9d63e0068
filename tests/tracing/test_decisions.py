"""Branches on masks and tokens: as on the example, asserted on every call; on anything else, refused as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import TraceError
from fxsparse.graph.record import TRACE_KEY


class Inner(nn.Module):
    """Scales masked rows, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor, any_hidden: bool) -> Tensor:
        y: Tensor = self.linear(x)
        return y * (1 + mask[..., None]) if any_hidden else y


class Branching(nn.Module):
    """Asks its mask, as Longformer does; ``drop`` skips layers at random in training, ``by_value`` asks activations."""

    def __init__(self, drop: bool = False, by_value: bool = False, by_layer: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(Inner() for _ in range(3))
        self.drop, self.by_value, self.by_layer = drop, by_value, by_layer

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = (1.0 - mask.to(x.dtype)) > 0
        any_hidden = hidden.flatten().any().item()
        for number, layer in enumerate(self.layers):
            if self.drop and self.training and torch.rand([]) < 0.5:
                continue
            if self.by_value and (x > 5).any():
                continue
            if self.by_layer and (mask.sum() > number).item():
                continue
            x = x + layer(x, mask, any_hidden)
        if not torch.is_nonzero(mask.sum()):
            x = x * 0
        return x


def batch(size: int, *, hides: bool) -> tuple[Tensor, Tensor]:
    mask = torch.ones(size, 6, dtype=torch.int64)
    if hides:
        mask[0, 4:] = 0
    return torch.randn(size, 6, 8), mask


@pytest.mark.parametrize("hides", [False, True])
def test_a_branch_on_a_mask_is_the_examples(hides: bool) -> None:
    torch.manual_seed(0)
    model = Branching()
    gm = fxsparse.trace(model, batch(3, hides=hides))
    notes = [note for note in gm.meta[TRACE_KEY].notes if "branch was taken" in note]
    assert len(notes) == 2 and f"({hides})" in notes[0] and "(True)" in notes[1] and "test_decisions.py" in notes[0]
    for mode in (True, False):
        x, mask = batch(5, hides=hides)
        torch.testing.assert_close(gm.train(mode)(x, mask), model.train(mode)(x, mask))
        with pytest.raises(RuntimeError, match=rf"was {hides} on the example .* trace the model"):
            gm(*batch(5, hides=not hides))
    if hides:
        with pytest.raises(RuntimeError, match="was True on the example"):
            gm(x, torch.zeros_like(mask))


def test_the_check_stays_through_passes_files_and_compilation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = Branching(), batch(3, hides=False)
    passes = "nm-masks{keep_first=false,keep_head=false},select-tensors{rho=0.7}"
    sparse = fxsparse.rewrite(model, passes, example)
    fxsparse.save(sparse, tmp_path / "model.safetensors")
    loaded = fxsparse.load(tmp_path / "model.safetensors", model, example)
    torch._dynamo.reset()
    fast = torch.compile(sparse, backend="fxsparse", options={"compiler": "aot_eager"})
    x, mask = batch(4, hides=False)
    expected = sparse(x, mask)
    modules: tuple[Any, ...] = (sparse, loaded, fast)
    for module in modules:
        torch.testing.assert_close(module(x, mask), expected)
        with pytest.raises(RuntimeError, match="was False on the example"):
            module(*batch(4, hides=True))


def test_what_is_drawn_at_random_is_not_decided() -> None:
    """The model is captured as it evaluates, as without the branch on its mask."""
    with pytest.warns(UserWarning, match="Branching is captured as it evaluates, because in training it branches on"):
        gm = fxsparse.trace(Branching(drop=True), batch(3, hides=False))
    notes = "\n".join(gm.meta[TRACE_KEY].notes)
    assert "branches on data" in notes and notes.count("branch was taken") == 2
    model = Branching(drop=True).eval()
    model.load_state_dict(gm.state_dict())
    x, mask = batch(5, hides=False)
    torch.testing.assert_close(gm.train()(x, mask), model(x, mask))


@pytest.mark.parametrize("options", [{"by_value": True}, {"by_layer": True}])
def test_activations_and_lines_with_both_answers_are_refused(options: dict[str, bool]) -> None:
    x, mask = batch(3, hides=False)
    mask = mask * 0
    mask[0, 0] = 1
    with pytest.raises(TraceError, match="Python needs the value of a tensor"):
        fxsparse.trace(Branching(**options), (x, mask))
