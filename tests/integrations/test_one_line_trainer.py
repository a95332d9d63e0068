"""The stock Trainer with a model that one line compiles and rewrites equals the Trainer of the rewritten graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxsparse
from tests.support.families import FAMILIES

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS, ROWS = 4, 4
RECIPES = ["greentrainer", "slope-low-rank", "prumux"]


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS, logging_steps=1, learning_rate=1e-2,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    torch.manual_seed(0)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def examples(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor[row] for name, tensor in batch.items()} for row in range(len(batch["input_ids"]))]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_module_compiled_in_place_trains_as_the_graph_does(recipe: str, tmp_path: Path) -> None:
    from fxsparse.backend.whole_model import with_dense_weights
    from fxsparse.integrations import FxsparseCallback, FxsparseTrainer

    family = FAMILIES["bert"]()
    model, data = without_dropout(family.model), examples(dict(family.make_batch(STEPS * ROWS)))
    batch = {name: tensor[:ROWS] for name, tensor in family.make_batch(ROWS).items()}
    pipeline = with_dense_weights(fxsparse.recipe(recipe))
    gm = fxsparse.rewrite(copy.deepcopy(model), pipeline, kwargs=batch)
    expected = losses(FxsparseTrainer(gm, arguments(tmp_path / "graph"), train_dataset=data))

    model.compile(backend="fxsparse", options={"recipe": recipe, "compiler": "eager"})
    callback = FxsparseCallback()
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=[callback])
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert callback.schedule is not None and callback.schedule.is_bound and callback.schedule.steps_done == STEPS
    added = {
        name.removeprefix("_fxsparse."): value for name, value in model.state_dict().items() if "_fxsparse" in name
    }
    state = gm.state_dict()
    assert added and all(torch.allclose(value, state[name], atol=1e-4) for name, value in added.items())
    assert callback.values() and callback.values() == pytest.approx(
        {name: value for name, value in trainer.state.log_history[-2].items() if name in callback.values()}
    )


def test_weights_that_the_first_call_compresses_train_as_the_module_form_does(tmp_path: Path) -> None:
    """The Trainer builds its optimizer before the first call, of weights that are gone after it."""
    from fxsparse.integrations import FxsparseCallback

    family = FAMILIES["bert"]()
    model, data = without_dropout(family.model), examples(dict(family.make_batch(STEPS * ROWS)))
    batch = {name: tensor[:ROWS] for name, tensor in family.make_batch(ROWS).items()}
    module = fxsparse.to_module(
        fxsparse.rewrite(copy.deepcopy(model), fxsparse.recipe("slope-low-rank"), kwargs=batch), model
    )
    callbacks = [FxsparseCallback()]
    expected = losses(
        transformers.Trainer(module, arguments(tmp_path / "module"), train_dataset=data, callbacks=callbacks)
    )

    dense = sum(parameter.nbytes for parameter in model.parameters())
    options = {"recipe": "slope-low-rank", "weights": "compressed", "compiler": "eager"}
    model.compile(backend="fxsparse", options=options)
    callback = FxsparseCallback()
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=[callback])
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert callback.schedule is not None and callback.schedule.is_bound and callback.schedule.steps_done == STEPS
    state, twin = model.state_dict(), module.state_dict()
    assert state.keys() == twin.keys() and any(name.endswith("weight_values") for name in state)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, twin[name], rtol=1e-3, atol=1e-4, msg=name)
    assert sum(parameter.nbytes for parameter in model.parameters()) < dense
    trainer.save_model(tmp_path / "saved")
    read = fxsparse.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(read(**batch).logits, model.eval()(**batch).logits)


def test_accelerate_knows_no_backend_of_this_name(tmp_path: Path) -> None:
    """So the model is compiled before it is given to the Trainer, as the documentation says."""
    with pytest.raises(ValueError, match=r"(?i)fxsparse"):
        transformers.Trainer(
            FAMILIES["bert"]().model, arguments(tmp_path, torch_compile=True, torch_compile_backend="fxsparse")
        )
