"""The first lines of the README on many families of transformers, as ``from_pretrained`` gives them.

Every family is traced, rewritten, trained for a step, saved and loaded. Three run always; ``FXSPARSE_ALL_FAMILIES=1``
runs all, half an hour on a slow machine, and ``FXSPARSE_UPDATE_GOLDEN=1`` writes the table in ``docs/models.md`` anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import fxsparse
from fxsparse.errors import FxsparseError
from fxsparse.passes import DoublePruneBackward, InsertNMMasks
from tests.support.hub import HUB

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ALWAYS = ("distilbert", "qwen3", "clip")
ROW = re.compile(r"^\| ([\w-]+) \| (\w+) \| (.+) \|$", re.MULTILINE)


def is_on(variable: str) -> bool:
    return os.environ.get(variable, "0") not in {"", "0"}


def rows() -> dict[str, tuple[str, str]]:
    """Class and outcome of every family on the page."""
    cells = ROW.findall(PAGE.read_text())[1:]  # the first names the columns
    return {name: (architecture, outcome) for name, architecture, outcome in cells}


def test_the_table_names_every_family() -> None:
    assert {name: row[0] for name, row in rows().items()} == {name: item.architecture for name, item in HUB.items()}


def outcome_of(name: str) -> str:
    """Runs everything on one family: the number of linears that became 2:4, or the first words of a refusal."""
    family = HUB[name]
    model, batch, other = family.build(), family.make_batch(3), family.make_batch(5)
    try:
        gm = fxsparse.trace(model, kwargs=batch)
    except FxsparseError as error:
        return f"refused: {str(error).splitlines()[0]}"
    fixed = [note for note in gm.meta["fxsparse_trace"].notes if "dimension 0 stays" in note]
    if fixed:
        other = family.make_batch(3)
    key = "logits_per_image" if name == "clip" else "logits"
    torch.testing.assert_close(gm(**other)[key], model(**other)[key], rtol=1e-4, atol=1e-5)
    sparse = fxsparse.rewrite(model, [InsertNMMasks("2:4"), DoublePruneBackward()], kwargs=batch)
    assert "double-prune" in fxsparse.explain(sparse)
    count = sum(change.rewritten for change in fxsparse.record_of(sparse).entries[0].changes)
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items() if name.endswith("_values")}
    assert before
    sparse.train()
    output = sparse(**other)
    loss = output.get("loss")
    (output[key].square().mean() if loss is None else loss).backward()
    torch.optim.SGD(sparse.parameters(), lr=1.0).step()
    after = sparse.state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    return f"{count}{'; ' + fixed[0] if fixed else ''}"


@pytest.mark.parametrize("name", HUB if is_on("FXSPARSE_ALL_FAMILIES") else ALWAYS)
@pytest.mark.filterwarnings("ignore")
def test_first_snippet(name: str, tmp_path: Path) -> None:
    outcome = outcome_of(name)
    if is_on("FXSPARSE_UPDATE_GOLDEN"):
        PAGE.write_text(
            ROW.sub(lambda row: f"| {name} | {row[2]} | {outcome} |" if row[1] == name else row[0], PAGE.read_text())
        )
    assert rows()[name][1] == outcome
    if outcome.startswith("refused"):
        return
    family = HUB[name]
    batch = family.make_batch(3)
    sparse = fxsparse.rewrite(family.build(), "nm-masks,double-prune", kwargs=batch)
    fxsparse.save(sparse, tmp_path / "model.safetensors")
    loaded = fxsparse.load(tmp_path / "model.safetensors", family.build(), kwargs=batch)
    key = "logits_per_image" if name == "clip" else "logits"
    assert torch.equal(loaded(**batch)[key], sparse(**batch)[key])
