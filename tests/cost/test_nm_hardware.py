"""What n:m hardware skips in a training step, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.graph.record import Record, record_of
from fxsparse.passes import DoublePruneBackward, InsertNMMasks
from tests.support.traced import traced

ROWS = 6
FIRST, SECOND, THIRD = 2 * ROWS * 8 * 16, 2 * ROWS * 16 * 16, 2 * ROWS * 16 * 8
DENSE = 2 * FIRST + 3 * SECOND + 3 * THIRD  # the model's input needs no gradient


def step_of(passes: object) -> tuple[int, str]:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))
    gm = fxsparse.rewrite(model, passes, (torch.randn(ROWS, 8),))  # type: ignore[arg-type]
    after = record_of(gm).entries[-1].after.nm_step_flops
    assert after is not None
    return after, fxsparse.explain(gm)


@pytest.mark.parametrize("storage", ["compressed", "masked"])
@pytest.mark.parametrize(
    ("options", "twice", "forward", "backward"),
    [
        ({}, None, 2, 1),  # the rows of W^R alone are 2:4, and dY W^R sums over the others
        ({}, DoublePruneBackward(), 2, 2),
        ({"transposable": True}, None, 2, 2),
        ({"pattern": "2:8"}, DoublePruneBackward(), 4, 4),
        ({"pattern": "2:8"}, DoublePruneBackward("2:4"), 4, 2),
    ],
)
def test_double_pruning_is_credited_with_the_gradient_of_the_input(
    options: dict[str, object], twice: DoublePruneBackward | None, forward: int, backward: int, storage: str
) -> None:
    masks = InsertNMMasks(**{"pattern": "2:4", "storage": storage, **options})  # type: ignore[arg-type]
    step, text = step_of([masks, *([twice] if twice else [])])
    assert step == DENSE - 2 * SECOND + SECOND // forward + SECOND // backward
    differs = storage == "masked" or forward != backward or bool(twice)  # from the count by stored elements, somewhere
    assert ("step FLOPs on n:m hardware" in text) == differs
    if twice:
        entry = text[text.index("2. double-prune") :]
        assert "step FLOPs on n:m hardware" in entry.splitlines()[1]


def test_a_branch_adds_what_it_adds() -> None:
    branch = 2 * ROWS * (16 * 2 + 2 * 16)
    for storage in ("compressed", "masked"):
        masks = f"nm-masks{{storage={storage}}},double-prune"
        without, _ = step_of(masks)
        assert step_of(f"{masks},low-rank{{rank=2,start=0.0}}")[0] == without + 3 * branch + branch // 2


def test_what_is_not_trained_costs_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    model[0].requires_grad_(False)
    gm = fxsparse.rewrite(model, "nm-masks,double-prune", (torch.randn(ROWS, 8),))
    after = record_of(gm).entries[-1].after.nm_step_flops
    assert after == FIRST + SECOND // 2 + SECOND + 3 * THIRD  # no gradient before the second linear


def test_models_without_n_m_weights_do_not_speak_of_it() -> None:
    gm = fxsparse.rewrite(traced("opt")[1], "drop-layers{fraction=0.34}")
    assert "n:m hardware" not in fxsparse.explain(gm)
    entry = record_of(gm).entries[0]
    assert entry.after.nm_step_flops == entry.after.step_flops


def test_records_of_earlier_versions_are_read() -> None:
    gm = fxsparse.rewrite(traced("opt")[1], "nm-masks,double-prune")
    text = record_of(gm).to_json()
    lines = [line for line in text.splitlines() if '"nm_step_flops"' not in line and '"backward"' not in line]
    old = "\n".join(lines).replace(",\n   }", "\n   }").replace(",\n  }", "\n  }")
    record = Record.from_json(old)
    assert all(entry.after.nm_step_flops is None for entry in record.entries)
    assert "n:m hardware" not in fxsparse.explain(record) and "double-prune" in fxsparse.explain(record)
