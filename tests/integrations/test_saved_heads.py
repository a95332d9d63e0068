"""Folders and modules of models that have lost heads, whose classes store how many there are under names of their own,
in their configuration, or as the length of a table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxsparse
from benchmarks.families.tiny import build, floats
from fxsparse.errors import CheckpointError
from fxsparse.graph.record import record_of
from fxsparse.passes.structured.hard_concrete import gated, mask_name

FAMILIES = ("phi3", "moonshine", "swin", "deberta")


def outputs(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return floats(model.eval()(**batch))


def without_heads(model: Any, batch: dict[str, Any], closed: int) -> Any:
    """Another head gone from every attention."""
    gm = fxsparse.trace(model, kwargs=batch)
    gates = fxsparse.rewrite(gm, "gates{units=[heads],score=random,target=0.0}")
    for at, item in enumerate(gated(gates)):
        assert item.units is not None
        mask = gates.get_buffer(mask_name(item.units))
        if len(mask) > 1 and (at + closed) % 2:
            mask[(at + closed) % len(mask)] = 0
    small = fxsparse.rewrite(gates, "materialize")
    assert record_of(small).entries[-1].rewritten
    return small


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_go_once_and_again(name: str, tmp_path: Path) -> None:
    family = build(name)
    model: Any = copy.deepcopy(family.model).eval()
    batch = family.batch(2)
    for turn in range(2):
        small = without_heads(model, batch, turn)
        for made in (fxsparse.to_module(small, model), fxsparse.save_pretrained(small, model, tmp_path / str(turn))):
            assert type(made) is type(family.model)
            for mine, its in zip(outputs(made, batch), outputs(small, batch), strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        model = fxsparse.from_pretrained(tmp_path / str(turn))
        for mine, its in zip(outputs(model, batch), outputs(small, batch), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_a_number_that_no_module_stores_is_refused(tmp_path: Path) -> None:
    family = build("phi3")
    fxsparse.save_pretrained(without_heads(family.model, family.batch(2), 0), family.model, tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert '"config.num_attention_heads": 3' in text
    data = json.loads(text.replace("config.num_attention_heads", "config.number_of_heads"))
    del data["fxsparse"]["checksum"]
    config.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"Phi3Attention stores no number config\.number_of_heads"):
        fxsparse.from_pretrained(tmp_path)
