"""What libraries do with a model, done with a module that was made of a rewritten graph."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import CheckpointError, RewriteError
from fxsparse.modules.sites import STARTED, module_sites
from fxsparse.ops.nm import Pattern, satisfies
from fxsparse.passes import DropLayers
from tests.modules.test_to_module import assert_refuses_to_merge_the_head, pruned
from tests.support.clients import batches, by_hand, cells, llama, refused_or, rewritten
from tests.support.families import VOCABULARY, Family
from tests.support.ranks import on_ranks
from tests.support.traced import traced


def converted(name: str, *passes: Any) -> tuple[Family, GraphModule, Any]:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [*passes])
    with torch.no_grad():
        for key, parameter in gm.named_parameters():
            if key.endswith("_up"):
                parameter.normal_(std=0.2)
    return family, gm, fxsparse.to_module(gm, family.model).eval()


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generate_gives_the_tokens_of_the_dense_model_with_these_weights(name: str) -> None:
    """With its cache, also of a model without its first layer, whose place in the cache others took over."""
    family, gm, module = converted(name, "nm-masks{pattern=2:4,keep_head=false}", "low-rank{rank=2,start=0}")
    dense = copy.deepcopy(family.model).eval()
    dense.load_state_dict(fxsparse.dense_state_dict(gm))
    prompt = torch.randint(2, VOCABULARY, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = dense.generate(prompt, use_cache=True, **options)
    assert torch.equal(module.generate(prompt, use_cache=True, **options), wanted)
    assert torch.equal(module.generate(prompt, use_cache=False, **options), wanted)
    assert torch.equal(
        module.generate(prompt, use_cache=True, num_beams=2, **options),
        dense.generate(prompt, use_cache=True, num_beams=2, **options),
    )
    indices: Any = {"encoder.*": (0,), "decoder.*": (0,)} if name == "t5" else (0,)
    _, _, short = converted(name, DropLayers(indices=indices), "nm-masks")
    tokens = [short.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*tokens)


# --- hooks and checkpointing ------------------------------------------------------------------------------------------


def test_hooks_of_the_model_go_with_its_modules_and_new_ones_fire() -> None:
    family, base = traced("llama")
    seen: list[str] = []
    family.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append("old"))
    module: Any = fxsparse.to_module(fxsparse.rewrite(base, "nm-masks"), family.model)
    seen.clear()
    module.model.layers[1].register_forward_pre_hook(lambda *_: seen.append("layer"))
    module.model.layers[1].mlp.up_proj.register_full_backward_hook(lambda *_: seen.append("backward"))
    module(**family.make_batch(batch=2)).loss.backward()
    assert seen == ["layer", "old", "backward"]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_gradient_checkpointing_recomputes_layers(name: str) -> None:
    family, _, module = converted(name, "nm-masks{pattern=2:4},double-prune", "low-rank{rank=2,start=0}")
    for part in module.train().modules():  # nothing is random
        for name, value in list(vars(part).items()):
            if ("dropout" in name and isinstance(value, float)) or (isinstance(part, nn.Dropout) and name == "p"):
                setattr(part, name, 0.0)
    batch = family.make_batch(batch=2)
    gradients = []
    calls: list[int] = []
    sites = [site for site in module_sites(module) if "layers.1" in site.path or "block.1" in site.path]
    sites[0].module.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            module.gradient_checkpointing_enable()
        module.zero_grad()
        calls.clear()
        module(**batch).loss.backward()
        assert len(calls) == 1 + checkpointing
        gradients.append({key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-6)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def lora(module: nn.Module, targets: list[str], **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(module, config)


@pytest.mark.parametrize("name, targets", [("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"])])
def test_lora_trains_beside_weights_that_keep_their_zeros(name: str, targets: list[str]) -> None:
    family, gm, module = converted(name, "nm-masks{pattern=2:4,keep_first=false}")
    dense = {key: tensor.clone() for key, tensor in fxsparse.dense_state_dict(module).items()}
    batch = family.make_batch(batch=2)
    before = module(**batch).logits
    adapted = lora(module, targets)
    assert not torch.allclose(adapted(**batch).logits, before)
    with adapted.disable_adapter():
        assert torch.equal(adapted(**batch).logits, before)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and not any(key.endswith("_values") for key, p in adapted.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert fxsparse.explain(adapted) == fxsparse.explain(gm)
    with pytest.raises(CheckpointError, match=r"was moved since fxsparse\.to_module made it, as adapters do: unload"):
        fxsparse.dense_state_dict(adapted)
    plain = adapted.unload()
    assert torch.equal(plain(**batch).logits, before)
    for key, tensor in fxsparse.dense_state_dict(plain).items():
        assert torch.equal(tensor, dense[key]), key


def adapted_by_hand(adapted: nn.Module, module: nn.Module) -> list[nn.Parameter]:
    """Gives ``module`` adapters of the values of those in ``adapted``, by hooks; returns their parameters."""
    trained = []
    for path, layer in adapted.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = (nn.Parameter(part["default"].weight.detach().clone()) for part in (layer.lora_A, layer.lora_B))
            scale = layer.scaling["default"]
            module.get_submodule(path.removeprefix("base_model.model.")).register_forward_hook(
                lambda _, args, y, down=down, up=up, scale=scale: y + args[0] @ down.t() @ up.t() * scale
            )
            trained += [down, up]
    return trained


@pytest.mark.parametrize(("recipe", "reason"), cells("PEFT"))
def test_adapters_beside_every_recipe_train_as_by_hand(recipe: str, reason: str | None) -> None:
    """The recipe is trained first; then only adapters are, and the rewritten weights stay what they are."""
    gm = rewritten(recipe)
    by_hand(gm, autocast=False)

    def run() -> None:
        module = fxsparse.to_module(gm, llama()).eval()
        twin, before = copy.deepcopy(module).requires_grad_(False), copy.deepcopy(module.state_dict())
        adapted = lora(module, ["q_proj", "up_proj"])
        ours, theirs = [p for p in adapted.parameters() if p.requires_grad], adapted_by_hand(adapted, twin)
        assert len(ours) == len(theirs) == 4 * len(twin.model.layers)
        for model, trained in ((adapted, ours), (twin, theirs)):
            optimizer = torch.optim.AdamW(trained, lr=1e-2)
            for batch in batches()[:4]:
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        after = adapted.unload().state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    refused_or(reason, run)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name, target", [("llama", "up_proj"), ("gpt2", "c_fc")])
def test_merging_an_adapter_into_compressed_weights_is_refused(name: str, target: str, safe: bool) -> None:
    """The merged weight has no zeros, so it cannot be held compressed."""
    family, _, module = converted(name, "nm-masks{pattern=2:4}")
    adapted = lora(module, [target])
    batch = family.make_batch(batch=2)
    before = adapted(**batch).logits
    with pytest.raises(RewriteError, match=rf"{target}.weight: .*read-only.*To merge an adapter"):
        adapted.merge_and_unload(safe_merge=safe)
    assert torch.equal(adapted(**batch).logits, before)


def test_merging_into_masked_weights_keeps_the_mask_and_beside_a_branch_is_exact() -> None:
    family, _, module = converted("llama", "nm-masks{pattern=2:4,storage=masked}")
    merged = lora(module, ["up_proj"]).merge_and_unload()
    for key, tensor in fxsparse.dense_state_dict(merged).items():
        if key.endswith("up_proj.weight"):
            assert satisfies(tensor, Pattern(2, 4))
    family, _, module = converted("llama", "low-rank{rank=2,start=0,layers=*}")
    adapted = lora(module, ["up_proj"])
    batch = family.make_batch(batch=2)
    before = adapted(**batch).logits
    torch.testing.assert_close(adapted.merge_and_unload()(**batch).logits, before, rtol=1e-4, atol=1e-5)


def test_a_schedule_drives_a_module_inside_adapters() -> None:
    """Modules move when they are wrapped, and are looked up where they are."""
    family, _, module = converted("llama", "nm-masks{pattern=2:4},double-prune{every=1}")
    site = next(site for site in module_sites(module) if site.path.endswith("layers.1.mlp.up_proj"))
    adapted = lora(module, ["up_proj"])
    adapted.requires_grad_(True)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.5)
    schedule = fxsparse.Schedule(adapted, optimizer, total_steps=2)
    before = site["column_mask"].clone()
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**family.make_batch(batch=2)).loss.backward()
        optimizer.step()
        schedule.step()
    assert not torch.equal(site["column_mask"], before)


# --- sharded ----------------------------------------------------------------------------------------------------------

PASSES = "nm-masks{pattern=2:4},double-prune{every=0},low-rank{rank=2,start=0.5}"


def sharded_steps(rank: int, folder: str) -> dict[str, Tensor]:
    """Four steps of a module sharded layer by layer, its losses and its whole state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    start = torch.load(f"{folder}/start.pt", weights_only=False)
    module, batches = start["module"], start["batches"]
    if rank >= 0:
        for layer in module.model.layers:
            fully_shard(layer)
        fully_shard(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    schedule = fxsparse.Schedule(module, optimizer, total_steps=len(batches))
    for batch in batches:
        optimizer.zero_grad()
        share = batch if rank < 0 else {key: tensor.chunk(2)[rank] for key, tensor in batch.items()}
        module(**share).loss.backward()
        optimizer.step()
        schedule.step()
    if rank < 0:
        return {key: tensor.detach() for key, tensor in module.state_dict().items()}
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))


def test_a_module_sharded_layer_by_layer_trains_as_in_one_process(tmp_path: Path) -> None:
    family, _, module = converted("llama", PASSES)
    batches = [family.make_batch(batch=4) for _ in range(4)]
    torch.save({"module": module.eval(), "batches": batches}, tmp_path / "start.pt")
    wanted = sharded_steps(-1, str(tmp_path))
    first, _ = on_ranks(tmp_path / "ranks", sharded_steps, str(tmp_path))
    assert first.keys() == wanted.keys() and wanted[STARTED].all()
    for key, tensor in wanted.items():
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


# --- the Trainer ------------------------------------------------------------------------------------------------------


def test_the_stock_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    family, _, module = converted("llama", "nm-masks{pattern=2:4},double-prune{every=2},low-rank{rank=2,start=0.5}")
    rows = [{key: tensor[0] for key, tensor in family.make_batch(batch=1).items()} for _ in range(16)]
    by_hand = copy.deepcopy(module)

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.schedule = fxsparse.Schedule(kwargs["model"], kwargs["optimizer"], total_steps=4)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.schedule.step()

    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        save_steps=4,
        logging_steps=1,
        data_seed=0,
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    trainer = transformers.Trainer(module, arguments, train_dataset=rows, callbacks=[Steps()])
    assert trainer.model_accepts_loss_kwargs  # the loss is averaged over num_items_in_batch
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and module.state_dict()[STARTED].all()

    optimizer = torch.optim.AdamW(by_hand.train().parameters(), lr=1e-2, weight_decay=0.0)
    schedule = fxsparse.Schedule(by_hand, optimizer, total_steps=4)
    batches = iter(trainer.get_train_dataloader())
    for loss in losses:
        optimizer.zero_grad()
        parts = [next(batches), next(batches)]
        items = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        total = sum(by_hand(**part, num_items_in_batch=items).loss for part in parts)
        total.backward()
        optimizer.step()
        schedule.step()
        assert abs(float(total.detach()) - loss) < 1e-3

    loaded = fxsparse.from_pretrained(tmp_path / "run" / "checkpoint-4")
    batch = family.make_batch(batch=2)
    torch.testing.assert_close(loaded(**batch).loss, module.eval()(**batch).loss)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize(
    "name, passes",
    [
        ("llama", ["nm-masks,double-prune", "low-rank{rank=2,start=0}"]),
        ("gpt2", [DropLayers(indices=(0,)), "nm-masks{storage=masked,dynamic=true}", "low-rank{rank=2,start=0.5}"]),
        ("t5", [DropLayers(indices={"encoder.*": (0,)}), "nm-masks{pattern=1:4}", "low-rank{rank=2,start=0,layers=*}"]),
        ("opt", ["nm-masks", "low-rank{rank=2,start=0,layers=*.*}"]),
    ],
)
def test_a_module_is_written_and_read_compressed(name: str, passes: list[Any], plainly: bool, tmp_path: Path) -> None:
    family, gm, module = converted(name, *passes)
    if plainly:
        module.save_pretrained(tmp_path)
    else:
        fxsparse.save_pretrained(module, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["fxsparse"]["modules"]
    with pytest.raises((OSError, ValueError), match=r"fxsparse\.from_pretrained"):
        type(module).from_pretrained(tmp_path)
    read: Any = fxsparse.from_pretrained(tmp_path)
    assert type(read) is type(module) and str(read) == str(module)
    assert fxsparse.explain(read) == fxsparse.explain(gm)
    batch = family.make_batch(batch=3)
    torch.testing.assert_close(read(**batch).loss, module(**batch).loss, rtol=1e-6, atol=1e-6)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in module.state_dict().values()}
    assert size < sum(held.values()) + 40_000
    read.save_pretrained(tmp_path / "again")
    with pytest.raises((OSError, ValueError), match=r"fxsparse\.from_pretrained"):
        type(module).from_pretrained(tmp_path / "again")
    half: Any = fxsparse.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {site.module.part(site.leaf, "values").dtype for site in module_sites(half) if site.compressed} <= {
        torch.bfloat16
    }
    optimizer = torch.optim.AdamW(read.parameters(), lr=1e-2)
    schedule = fxsparse.Schedule(read, optimizer, total_steps=2)
    read(**batch).loss.backward()
    optimizer.step()
    schedule.step()
    if any(site.name == "lm_head.weight" for site in module_sites(read)):  # a branch that the tied embedding is without
        assert_refuses_to_merge_the_head(gm, read)
    else:
        assert fxsparse.dense_state_dict(read).keys() == fxsparse.dense_state_dict(gm).keys()


def test_a_pruned_module_is_read_with_its_sizes(tmp_path: Path) -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(pruned(base), "nm-masks{pattern=1:2,keep_first=false}")
    module = fxsparse.to_module(gm, family.model).eval()
    fxsparse.save_pretrained(module, tmp_path)
    batch = family.make_batch(batch=3)
    torch.testing.assert_close(fxsparse.from_pretrained(tmp_path)(**batch).loss, module(**batch).loss)


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    gm = fxsparse.rewrite(model, "nm-masks", (torch.randn(3, 8),))
    with pytest.raises(CheckpointError, match=r"Sequential is no Hugging Face model; write it with fxsparse\.save"):
        fxsparse.save_pretrained(fxsparse.to_module(gm, model), tmp_path)
    with pytest.raises(CheckpointError, match=r"save_pretrained\(gm, model, path\)"):
        fxsparse.save_pretrained(gm, model)
