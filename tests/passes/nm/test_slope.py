"""SLoPe on every family: against the method in plain torch, in training and evaluation, eager and compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.graph.record import record_of
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.passes import AddLowRankBranches, DoublePruneBackward, InsertNMMasks
from fxsparse.passes.nm.sparse_linear import sparse_linears
from tests.support.families import FAMILIES, draws_alike
from tests.support.oracle import dense_gradient, masks_of, oracle_of
from tests.support.traced import traced

CORE = ("sequential", "bert", "opt", "gpt2", "llama", "t5")
# Weights of each family's linears that are neither the first after the input, nor a head, nor tied to an embedding.
SPARSE = {"sequential": 1, "bert": 6 * 3 - 3 + 1, "opt": 6 * 3 - 3, "gpt2": 4 * 2 - 1, "llama": 7 * 3 - 3, "t5": 32 - 6}
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def loss_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.loss


def logits_of(output: Any) -> Tensor:
    return output[1] if isinstance(output, tuple) else output.logits


@pytest.mark.parametrize("storage", ["compressed", "masked"])
@pytest.mark.parametrize("name", CORE)
def test_training_step_equals_the_method_in_plain_torch(name: str, storage: str) -> None:
    family, base = traced(name)
    passes = [InsertNMMasks("2:4", storage=storage), DoublePruneBackward()]
    gm = fxsparse.rewrite(base, passes)
    rewritten = [len(entry.rewritten) for entry in record_of(gm).entries]
    assert rewritten == [SPARSE[name], SPARSE[name]]
    oracle = oracle_of(family.model, gm)
    for training in (True, False) if draws_alike(gm) else (False,):
        gm.train(training), oracle.train(training)
        batch = family.make_batch(batch=3)  # another batch size than the traced one
        outputs = []
        for module in (gm, oracle):
            module.zero_grad()
            torch.manual_seed(1)
            outputs.append(module(**batch))
            loss_of(outputs[-1]).backward()
        torch.testing.assert_close(logits_of(outputs[0]), logits_of(outputs[1]), **TOLERANCE)
        _assert_gradients_equal(gm, oracle)


def _assert_gradients_equal(gm: GraphModule, oracle: nn.Module) -> None:
    expected = {
        parameter_name.replace(".module.", "."): parameter.grad
        for parameter_name, parameter in oracle.named_parameters()
    }
    held = {weight.name: weight for weight in record_of(gm).weights}
    for name, weight in held.items():
        grad = dense_gradient(gm, weight)
        torch.testing.assert_close(grad, expected[name], **TOLERANCE)
        mask, _ = masks_of(gm, weight)
        live = mask.t() if weight.transposed else mask
        assert not grad[~live].any(), "a pruned weight has a gradient"
        assert grad[live].any(), "no live weight has a gradient"
    plain = {name: parameter for name, parameter in gm.named_parameters() if name in expected and name not in held}
    assert len(plain) > 0
    for name, parameter in plain.items():
        if expected[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], **TOLERANCE)


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:8", "4:8"])
def test_other_patterns(pattern: str) -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, f"nm-masks{{pattern={pattern}}},double-prune")
    n, m = map(int, pattern.split(":"))
    for weight in record_of(gm).weights:
        mask, column_mask = masks_of(gm, weight)
        assert (mask.unflatten(1, (-1, m)).sum(-1) == n).all()
        assert (column_mask.unflatten(0, (-1, m)).sum(1) <= n).all()
        assert not (column_mask & ~mask).any()
    oracle = oracle_of(family.model, gm).eval()
    batch = family.make_batch(batch=5)
    for module in (gm.eval(), oracle):
        loss_of(module(**batch)).backward()
    _assert_gradients_equal(gm, oracle)


@pytest.mark.parametrize("name", CORE)
def test_magnitude_masks_keep_the_largest(name: str) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, "nm-masks")
    original = dict(family.model.named_parameters())
    for weight in record_of(gm).weights:
        dense = original[weight.name].detach()
        dense = dense.t() if weight.transposed else dense
        assert torch.equal(masks_of(gm, weight)[0], nm_mask(dense.abs(), Pattern(2, 4)))


@pytest.mark.parametrize("name", CORE)
def test_zeros_stay_zero_and_the_pattern_stays_through_training(name: str) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, "nm-masks,double-prune{every=3}")
    before = {weight.name: masks_of(gm, weight)[0].clone() for weight in record_of(gm).weights}
    columns = {weight.name: masks_of(gm, weight)[1].clone() for weight in record_of(gm).weights}
    start = fxsparse.dense_state_dict(gm)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=20)
    for _ in range(20):
        loss_of(gm(**family.make_batch())).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    dense = fxsparse.dense_state_dict(gm)
    moved = 0
    for weight in record_of(gm).weights:
        mask, column_mask = masks_of(gm, weight)
        assert torch.equal(mask, before[weight.name])
        live = mask.t() if weight.transposed else mask
        assert not dense[weight.name][~live].any()
        assert not torch.equal(dense[weight.name], start[weight.name])
        moved += int((column_mask != columns[weight.name]).sum())
    assert moved > 0, "the column masks were never chosen anew"


@pytest.mark.parametrize("name", CORE)
def test_branches_change_nothing_at_insertion_and_then_train(name: str) -> None:
    family, base = traced(name)
    batch = family.make_batch()
    sparse = fxsparse.rewrite(base, "nm-masks,double-prune")
    branched = fxsparse.rewrite(sparse, [AddLowRankBranches(rank=3, start=0.0)])
    assert len(record_of(branched).entries[-1].rewritten) == SPARSE[name]
    assert all(linear.has_branch for linear in sparse_linears(branched))
    outputs = [logits_of(gm.eval()(**batch)) for gm in (sparse, branched)]
    assert torch.equal(*outputs)
    for linear in sparse_linears(branched):  # a branch that does something
        nn.init.normal_(branched.get_parameter(f"{linear.name}_up"), std=0.1)
    oracle = oracle_of(family.model, branched).eval()
    outputs = [module(**batch) for module in (branched, oracle)]
    torch.testing.assert_close(logits_of(outputs[0]), logits_of(outputs[1]), **TOLERANCE)
    for output in outputs:
        loss_of(output).backward()
    _assert_gradients_equal(branched, oracle)
    for weight in record_of(branched).weights:
        module = oracle.get_submodule(weight.name.rpartition(".")[0])
        for suffix in ("down", "up"):
            grad = branched.get_parameter(f"{weight.name}_{suffix}").grad
            torch.testing.assert_close(grad, getattr(module, suffix).grad, **TOLERANCE)
    assert not torch.equal(logits_of(outputs[0]), logits_of(sparse(**batch)))


def test_every_sample_gets_its_own_branch_output() -> None:
    family = FAMILIES["gpt2"]()
    gm = fxsparse.rewrite(
        family.model, [InsertNMMasks(), AddLowRankBranches(rank=2, start=0.0)], kwargs=family.make_batch(labels=False)
    ).eval()
    for linear in sparse_linears(gm):
        nn.init.normal_(gm.get_parameter(f"{linear.name}_up"), std=0.3)
    batch = family.make_batch(batch=5, labels=False)
    together = gm(**batch).logits
    for row in range(5):
        alone = gm(**{name: tensor[row : row + 1].expand(2, -1) for name, tensor in batch.items()}).logits[0]
        torch.testing.assert_close(together[row], alone, **TOLERANCE)


@pytest.mark.parametrize("name", CORE)
def test_merged_equals_unmerged(name: str) -> None:
    family, base = traced(name)
    batch = family.make_batch()
    gm = fxsparse.rewrite(base, [InsertNMMasks(), AddLowRankBranches(rank=3, start=0.0)]).eval()
    for linear in sparse_linears(gm):
        nn.init.normal_(gm.get_parameter(f"{linear.name}_up"), std=0.3)
    dense = copy.deepcopy(family.model).eval()
    dense.load_state_dict(fxsparse.dense_state_dict(gm))
    torch.testing.assert_close(logits_of(gm(**batch)), logits_of(dense(**batch)), **TOLERANCE)


@pytest.mark.parametrize("name", CORE)
def test_compiled_equals_eager(name: str) -> None:
    family, base = traced(name)
    passes = "nm-masks,double-prune,low-rank{rank=2,start=0.0}"
    gm = fxsparse.rewrite(base, passes)
    for linear in sparse_linears(gm):
        nn.init.normal_(gm.get_parameter(f"{linear.name}_up"), std=0.1)
    compiled = torch.compile(gm, backend="aot_eager")
    for training in (True, False):
        gm.train(training)
        batch = family.make_batch(batch=3)
        gradients = []
        for call in (gm, compiled):
            gm.zero_grad()
            torch.manual_seed(1)
            loss_of(call(**batch)).backward()
            gradients.append(
                {
                    name: parameter.grad.clone()
                    for name, parameter in gm.named_parameters()
                    if parameter.grad is not None
                }
            )
        assert gradients[0].keys() == gradients[1].keys() and gradients[0]
        for key in gradients[0]:
            torch.testing.assert_close(gradients[0][key], gradients[1][key], **TOLERANCE)


def test_weights_and_optimizer_state_shrink_to_053() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, dtype=torch.bfloat16) for _ in range(3)))
    batch = torch.randn(4, 256, dtype=torch.bfloat16)
    gm = fxsparse.rewrite(model, [InsertNMMasks(keep_first=False, keep_head=False), DoublePruneBackward()], (batch,))
    assert len(record_of(gm).weights) == 3
    sizes = []
    for module, names in ((model, "weight"), (gm, "weight_values")):
        chosen = [parameter for name, parameter in module.named_parameters() if name.endswith(names)]
        master = [parameter.detach().float().requires_grad_() for parameter in chosen]  # fp32 moments, as in design
        for parameter, copy_ in zip(chosen, master, strict=True):
            copy_.grad = torch.ones_like(copy_)
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(master)
        optimizer.step()
        moments = sum(
            tensor.nbytes
            for state in optimizer.state.values()
            for key, tensor in state.items()
            if key in ("exp_avg", "exp_avg_sq")
        )
        masks = sum(buffer.nbytes for name, buffer in module.named_buffers() if ".weight" in name or "weight_" in name)
        sizes.append(sum(parameter.nbytes + parameter.grad.nbytes for parameter in chosen) + masks + moments)
    assert sizes[1] / sizes[0] <= 0.53
