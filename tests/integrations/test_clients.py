"""Rewritten models in Trainer, accelerate and Lightning: each equals a loop by hand, and resumes bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.integrations import FxsparseCallback, FxsparseTrainer
from tests.support import clients
from tests.support.clients import (
    ACCUMULATE,
    CLIP,
    PAGE,
    RATE,
    RECIPES,
    STEPS,
    TESTED_IN,
    assert_equal_state,
    assert_moved,
    batches,
    by_hand,
    cells,
    has_gates,
    refused_or,
    rewritten,
    seed,
    table,
)

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_accelerator_of_before() -> Iterator[None]:
    """Mixed precision is a setting of the process to accelerate, which the Trainer uses."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_cell_of_the_table_is_tested() -> None:
    rows = table()
    assert rows.keys() == TESTED_IN.keys()
    for client, row in rows.items():
        assert row.keys() == RECIPES.keys()
        known = {"yes", "?", *clients.reasons()}
        assert set(row.values()) <= known, f"{PAGE.name} gives no reason for a cell of {client}"
        assert f'cells("{client}"' in (ROOT / TESTED_IN[client]).read_text(), (
            f"{TESTED_IN[client]} does not test {client}"
        )


# --- Trainer ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for a kill."""


class Seeded(transformers.TrainerCallback):
    """Seeds every step as a loop by hand does, and may stop the training."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at = stop_at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_at:
            raise Stopped
        seed(state.global_step + 1)


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": ACCUMULATE,
            "learning_rate": RATE,
            "weight_decay": 0.0,
            "optim": "adamw_torch",
            "lr_scheduler_type": "constant",
            "max_grad_norm": CLIP,
            "bf16": True,
            "use_cpu": True,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
            **options,
        }
    )


def rows() -> list[dict[str, torch.Tensor]]:
    """The rows of all micro-batches, in order."""
    return [{name: tensor[row] for name, tensor in batch.items()} for batch in batches() for row in range(4)]


def trainer_of(gm: nn.Module, folder: Path, *, stock: bool = False, stop_at: int | None = None, **options: Any) -> Any:
    callbacks = [Seeded(stop_at), *([FxsparseCallback()] if stock else [])]
    kind = transformers.Trainer if stock else FxsparseTrainer
    data = rows()
    return kind(gm, arguments(folder, **options), train_dataset=data, eval_dataset=data[:4], callbacks=callbacks)


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_and_resume(recipe: str, folder: Path, stock: bool) -> None:
    expected = rewritten(recipe)
    losses = by_hand(expected)
    assert_moved(expected, recipe)
    gm = rewritten(recipe)
    trainer = trainer_of(gm, folder, stock=stock)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-6)
    assert_equal_state(gm, expected)
    resumed = rewritten(recipe)
    trainer_of(resumed, folder, stock=stock).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_equal_state(resumed, expected)


@pytest.mark.parametrize(("recipe", "reason"), cells("Trainer"))
def test_trainer(recipe: str, reason: str | None, tmp_path: Path) -> None:
    refused_or(reason, lambda: train_and_resume(recipe, tmp_path, stock=False))


@pytest.mark.parametrize(("recipe", "reason"), cells("Trainer, callback", sample=("low-rank", "gates", "tensors")))
def test_stock_trainer_with_the_callback(recipe: str, reason: str | None, tmp_path: Path) -> None:
    refused_or(reason, lambda: train_and_resume(recipe, tmp_path, stock=True))


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_killed_training_resumes_from_its_last_checkpoint(stop_at: int, tmp_path: Path) -> None:
    expected = rewritten("low-rank")
    by_hand(expected)
    with pytest.raises(Stopped):
        trainer_of(rewritten("low-rank"), tmp_path, stop_at=stop_at, save_steps=1).train()
    gm = rewritten("low-rank")
    trainer = trainer_of(gm, tmp_path, save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert_equal_state(gm, expected)
    assert trainer.state.global_step == STEPS


def test_mixed_precision_of_the_trainer_reaches_every_step(tmp_path: Path) -> None:
    full = rewritten("static N:M")
    by_hand(full, autocast=False)
    for bf16, expected in ((True, rewritten("static N:M")), (False, full)):
        if bf16:
            by_hand(expected)
        gm = rewritten("static N:M")
        trainer_of(gm, tmp_path / str(bf16), bf16=bf16, save_strategy="no").train()
        assert_equal_state(gm, expected)
        assert bf16 == (not torch.equal(gm.state_dict()["lm_head.weight"], full.state_dict()["lm_head.weight"]))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    gm = rewritten("low-rank")
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 1, "learning_rate": 1.0}
    trainer = trainer_of(gm, tmp_path, **options)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert best < STEPS, "a learning rate of 1 makes the model worse"
    twin = rewritten("low-rank")
    trainer_of(twin, tmp_path / "twin", max_steps=best, learning_rate=1.0).train()
    assert torch.equal(gm.state_dict()["lm_head.weight"], twin.state_dict()["lm_head.weight"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_the_log_holds_the_values_of_the_schedule(tmp_path: Path) -> None:
    for recipe, name, expected in (
        ("low-rank", "low-rank.started", [0, 1, 1, 1]),
        ("neurons", "select-neurons.omission", [0.5, 0.0, 0.0, 0.0]),
        ("tensors", "select-tensors.rho", [0.7] * 4),
        ("gates", "gates.target", None),
    ):
        for stock in (False, True):
            trainer = trainer_of(rewritten(recipe), tmp_path, stock=stock, save_strategy="no")
            trainer.train()
            logged = [entry[f"fxsparse/{name}"] for entry in trainer.state.log_history if "loss" in entry]
            assert logged == expected if expected else logged[-1] == pytest.approx(0.5), recipe
            assert not any(f"fxsparse/{name}" in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_a_finished_model_is_read_by_from_pretrained_and_load(tmp_path: Path) -> None:
    gm = rewritten("low-rank")
    trainer = trainer_of(gm, tmp_path, save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    gm = trainer.accelerator.unwrap_model(gm, keep_fp32_wrapper=False).eval()
    batch = clients.make_batch()
    for load in (fxsparse.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        model = load(tmp_path / "final")
        torch.testing.assert_close(model(**batch).logits, gm(**batch).logits, rtol=1e-5, atol=1e-5)
        assert model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False).shape == (4, 11)
    assert model.config.use_cache
    loaded = fxsparse.load(tmp_path / "final" / "fxsparse.safetensors", clients.llama(), kwargs=batch).eval()
    assert torch.equal(loaded(**batch).logits, gm(**batch).logits)


def test_a_model_that_is_no_module_of_its_class_is_saved_as_a_graph(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gm = rewritten("mux")
    trainer = trainer_of(gm, tmp_path)
    with caplog.at_level(logging.WARNING), _propagating():
        trainer.save_model(str(tmp_path / "final"))
    assert "holds the graph alone, fxsparse.safetensors, which fxsparse.load reads" in caplog.text
    assert not (tmp_path / "final" / "config.json").exists(), "transformers would fill in random weights"
    batch = clients.make_batch()
    loaded = fxsparse.load(tmp_path / "final" / "fxsparse.safetensors", clients.llama(), kwargs=batch)
    assert torch.equal(loaded.eval()(**batch).logits, gm.eval()(**batch).logits)


@pytest.fixture
def tied() -> GraphModule:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_inner=64, n_layer=1, n_head=4, n_positions=16)
    return fxsparse.rewrite(transformers.GPT2LMHeadModel(config), "nm-masks", kwargs=clients.make_batch())


def test_tied_weights_and_norms(tied: GraphModule, tmp_path: Path) -> None:
    """One tensor under two names is saved once and loads; the weights of norms do not decay."""
    trainer = trainer_of(tied, tmp_path)
    decays = trainer.get_decay_parameter_names(tied)
    assert "transformer.h.0.mlp.c_fc.weight_values" in decays
    assert not any("ln_" in name or name.endswith("bias") for name in decays)
    trainer.train()
    assert tied.get_parameter("lm_head.weight") is tied.get_parameter("transformer.wte.weight")
    twin = fxsparse.rewrite(transformers.GPT2LMHeadModel(tied.config), "nm-masks", kwargs=clients.make_batch())
    trainer_of(twin, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal_state(twin, tied)
    with pytest.raises(fxsparse.OptionError, match=r"lm_head\.weight.*use FxsparseTrainer"):
        trainer_of(twin, tmp_path / "stock", stock=True).train()


@pytest.mark.parametrize("counted", [True, False])
def test_labels_of_unequal_number_count_as_in_the_original(counted: bool, tmp_path: Path) -> None:
    data = rows()
    for number, row in enumerate(data):
        row["labels"] = row["labels"].masked_fill(torch.arange(8) > 1 + number % 5, -100)
    more = {"num_items_in_batch": torch.tensor(1)} if counted else {}
    gm = fxsparse.trace(clients.llama(), kwargs={**clients.make_batch(), **more})
    models = [clients.llama(), gm]
    for model, kind in zip(models, (transformers.Trainer, FxsparseTrainer), strict=True):
        args = arguments(tmp_path, save_strategy="no", eval_strategy="no", bf16=False, learning_rate=1e-3)
        kind(model, args, train_dataset=data, callbacks=[Seeded()]).train()
    one, other = (model.get_parameter("lm_head.weight") for model in models)
    largest = float((one - other).detach().abs().max())
    assert (largest < 1e-5) == counted, f"without it micro-batches count alike; {largest}"


def test_what_the_trainer_would_lose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fxsparse.OptionError, match="label_smoothing_factor computes the loss from logits"):
        trainer_of(rewritten("distill"), tmp_path, label_smoothing_factor=0.1).train()
    with pytest.raises(fxsparse.OptionError, match=r"FxsparseTrainer takes a model .*fxsparse\.rewrite\(model, passes"):
        FxsparseTrainer(clients.llama(), arguments(tmp_path))
    with pytest.raises(fxsparse.OptionError, match=r"transformers\.Trainer\(module, args, callbacks="):
        FxsparseTrainer(fxsparse.to_module(rewritten("static N:M"), clients.llama()), arguments(tmp_path))
    trainer = trainer_of(clients.llama(), tmp_path, stock=True)
    with pytest.raises(fxsparse.OptionError, match=r"fxsparse\.Schedule takes a model"):
        trainer.train()
    trainer_of(rewritten("static N:M"), tmp_path, stock=True).train()
    (tmp_path / "checkpoint-2").rename(tmp_path / "moved")
    with pytest.raises(fxsparse.CheckpointError, match=r"FxsparseCallback\(resume_from=folder\)"):
        trainer_of(rewritten("static N:M"), tmp_path, stock=True).train(str(tmp_path / "moved"))
    gm = rewritten("static N:M")
    callback = FxsparseCallback(resume_from=tmp_path / "moved")
    trainer = transformers.Trainer(
        gm, arguments(tmp_path / "new"), train_dataset=rows(), eval_dataset=rows()[:4], callbacks=[callback]
    )
    trainer.train(str(tmp_path / "moved"))
    trainer_of(rewritten("static N:M"), tmp_path / "other", stock=True).train()
    callback.resume_from = tmp_path / "other" / "checkpoint-2"
    with pytest.raises(fxsparse.CheckpointError, match="of another training than the one that resumes"):
        trainer.train(str(tmp_path / "moved"))


class _propagating:
    """Lets the logs of transformers reach pytest."""

    def __enter__(self) -> None:
        transformers.utils.logging.enable_propagation()

    def __exit__(self, *_: Any) -> None:
        transformers.utils.logging.disable_propagation()


# --- accelerate -------------------------------------------------------------------------------------------------------


def accelerated(gm: GraphModule, steps: range, folder: Path, save_at: int | None = None) -> None:
    """Trains as the documentation says, from where ``folder`` was saved if the steps do not start at 0."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=ACCUMULATE)
    data = torch.utils.data.DataLoader(batches()[steps.start * ACCUMULATE : steps.stop * ACCUMULATE], batch_size=None)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=RATE, weight_decay=0.0)
    gm, optimizer, loader = accelerator.prepare(gm.train(), optimizer, data)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=STEPS)
    accelerator.register_for_checkpointing(schedule)
    if steps.start:
        accelerator.load_state(str(folder))
    for number, batch in enumerate(loader):
        step, micro = divmod(number, ACCUMULATE)
        if not micro:
            seed(steps[step] + 1)
        schedule.observe(batch)
        with accelerator.accumulate(gm):
            accelerator.backward(gm(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(gm.parameters(), CLIP)
                if has_gates(gm):
                    fxsparse.sparsity_loss(gm).backward()
            optimizer.step()
            if accelerator.sync_gradients:
                schedule.step()
            optimizer.zero_grad()
        if micro == ACCUMULATE - 1 and steps[step] + 1 == save_at:
            accelerator.save_state(str(folder))


@pytest.mark.parametrize(("recipe", "reason"), cells("accelerate"))
def test_accelerate(recipe: str, reason: str | None, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def run() -> None:
        expected, gm, resumed = (rewritten(recipe) for _ in range(3))
        by_hand(expected)
        accelerated(gm, range(STEPS), tmp_path, save_at=2)
        assert_equal_state(gm, expected)
        accelerate.state.GradientState._reset_state()
        accelerated(resumed, range(2, STEPS), tmp_path)
        assert_equal_state(resumed, expected)

    refused_or(reason, run)


# --- Lightning --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def lightning_module(gm: GraphModule) -> Any:
    """The module of the documentation."""
    lightning = pytest.importorskip("lightning")

    class Sparse(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gm = gm

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.gm.parameters(), lr=RATE, weight_decay=0.0)
            self.schedule = fxsparse.Schedule(self.gm, optimizer, total_steps=STEPS)
            return optimizer

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if index % ACCUMULATE == 0:
                seed(self.global_step + 1)
            self.schedule.observe(batch)
            return self.gm(**batch).loss

        def on_train_batch_end(self, *args: Any) -> None:
            if self.global_step == 2 and not (path := Path(self.trainer.default_root_dir) / "two.ckpt").exists():
                self.trainer.save_checkpoint(path)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            nn.utils.clip_grad_norm_(self.gm.parameters(), CLIP)
            if has_gates(self.gm):
                fxsparse.sparsity_loss(self.gm).backward()

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            self.schedule.step()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["schedule"] = self.schedule.state_dict()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.resumed = checkpoint["schedule"]

        def on_train_start(self) -> None:
            if hasattr(self, "resumed"):
                self.schedule.load_state_dict(self.resumed)

    return Sparse()


def lightning_trainer(folder: Path) -> Any:
    lightning = pytest.importorskip("lightning")
    return lightning.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATE,
        precision="bf16-mixed",
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


@pytest.mark.parametrize(
    ("recipe", "reason"), cells("Lightning", sample=("low-rank", "gates", "tensors", "neurons", "distill"))
)
@pytest.mark.filterwarnings("ignore")
def test_lightning(recipe: str, reason: str | None, tmp_path: Path, quiet: None) -> None:
    def run() -> None:
        expected, gm, resumed = (rewritten(recipe) for _ in range(3))
        by_hand(expected)
        lightning_trainer(tmp_path).fit(lightning_module(gm), torch.utils.data.DataLoader(batches(), batch_size=None))
        assert_equal_state(gm, expected)
        rest = torch.utils.data.DataLoader(batches()[2 * ACCUMULATE :], batch_size=None)  # Lightning skips no batches
        lightning_trainer(tmp_path).fit(lightning_module(resumed), rest, ckpt_path=tmp_path / "two.ckpt")
        assert_equal_state(resumed, expected)

    refused_or(reason, run)
