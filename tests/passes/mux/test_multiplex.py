"""Multiplexed graphs: against multiplexing by hand, at several batch sizes, eager and compiled, saved and resumed."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse import graph as fx
from fxsparse.analysis.structures import attentions, mlps
from fxsparse.errors import OptionError, RewriteError
from fxsparse.ops.multiplex import demux_linear, mux
from fxsparse.passes import DistillLayers, DropLayers, GateStructures, InsertNMMasks, Materialize, Multiplex, Pipeline
from fxsparse.passes.structured.hard_concrete import gated
from tests.support import multiplexed
from tests.support.families import FAMILIES, token_ids
from tests.support.outputs import outputs
from tests.support.traced import traced

LANGUAGE = ("bert", "opt", "gpt2", "llama")
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def multiplexer_state(gm: GraphModule) -> dict[str, Tensor]:
    return dict(gm.get_submodule("multiplex").named_parameters())


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5), (6, 2, 3, 5), (0, 3, 5)])
def test_operators_equal_loops(shape: tuple[int, ...]) -> None:
    n, dim, out = 3, 5, 4
    x, keys = torch.randn(shape), torch.randn(n, dim)
    expected = multiplexed.mixed(x, keys) if len(x) else x.new_empty(0, *shape[1:])
    torch.testing.assert_close(mux(x, keys, n), expected)
    weight, bias = torch.randn(out, 7 + dim), torch.randn(out)
    for own in (torch.randn(n, 7), torch.randn(len(x), n, 7)):
        rows = []
        for group, h in enumerate(x):
            for key in own if own.dim() == 2 else own[group]:
                rows.append(torch.cat([key.expand(*h.shape[:-1], 7), h], -1) @ weight.t() + bias)
        expected = torch.stack(rows) if rows else x.new_empty(0, *shape[1:-1], out)
        torch.testing.assert_close(demux_linear(x, own, weight, bias), expected)


def test_operators_pass_opcheck_and_gradcheck() -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    for args in ((random(6, 2, 5), random(3, 5), 3), (random(4, 5), random(2, 5), 2)):
        torch.library.opcheck(torch.ops.fxsparse.mux.default, args)
        assert torch.autograd.gradcheck(mux, args)
    for keys in (random(3, 7), random(2, 3, 7)):
        for bias in (random(4), None):
            args = (random(2, 2, 5), keys, random(4, 12), bias)
            torch.library.opcheck(torch.ops.fxsparse.demux_linear.default, args)
            assert torch.autograd.gradcheck(demux_linear, args)


def test_operators_refuse_what_does_not_fit() -> None:
    with pytest.raises(RewriteError, match="5 rows are not whole groups of 2"):
        mux(torch.randn(5, 3), torch.randn(2, 3), 2)
    with pytest.raises(RewriteError, match="keys"):
        mux(torch.randn(4, 3), torch.randn(3, 3), 2)
    with pytest.raises(RewriteError, match="weight"):
        demux_linear(torch.randn(4, 3), torch.randn(2, 3), torch.randn(5, 5), None)


# --- against multiplexing by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGE)
def test_one_member_with_unit_keys_is_the_identity(name: str) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [Multiplex(1, mux="unit", demux="repeat")])
    for training in (False, True):
        for rows in (1, 4, 5):
            batch = family.make_batch(batch=rows)
            outputs = []
            for model in (base.train(training), gm.train(training)):
                torch.manual_seed(1)
                outputs.append(model(**batch))
            assert torch.equal(outputs[0].logits, outputs[1].logits)
            assert torch.equal(outputs[0].loss, outputs[1].loss)


@pytest.mark.parametrize("name", LANGUAGE)
def test_identical_members_with_unit_keys_are_the_model_at_a_smaller_batch(name: str) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [Multiplex(2, mux="unit", demux="repeat")]).eval()
    batch = family.make_batch(batch=3)
    pairs = {key: rows.repeat_interleave(2, 0) for key, rows in batch.items()}
    expected = base.eval()(**batch).logits.repeat_interleave(2, 0)
    torch.testing.assert_close(gm(**pairs).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_outputs_and_gradients_equal_multiplexing_by_hand(name: str, rows: int) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [Multiplex(3, learned=True)]).eval()
    batch = family.make_batch(batch=rows)
    output = gm(**batch)
    output.loss.backward()
    ours = gradients(gm)
    gm.zero_grad()
    model = family.model.eval()
    model.load_state_dict(base.state_dict())
    state = {key: value.detach().clone().requires_grad_() for key, value in multiplexer_state(gm).items()}
    loss, logits = multiplexed.ORACLES[name](model, state, 3, batch)
    torch.testing.assert_close(output.logits, logits, **TOLERANCE)
    torch.testing.assert_close(output.loss, loss, **TOLERANCE)
    loss.backward()
    theirs = gradients(model) | {f"multiplex.{key}": value.grad for key, value in state.items()}
    assert theirs.keys() == ours.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], **TOLERANCE)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("rows", [2, 5])
def test_prefix_equals_multiplexing_by_hand(rows: int) -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, [Multiplex(2, demux="prefix")]).eval()
    batch = family.make_batch(batch=rows)
    loss, logits = multiplexed.opt_with_prefix(family.model.eval(), multiplexer_state(gm), 2, batch)
    torch.testing.assert_close(gm(**batch).logits, logits, **TOLERANCE)
    torch.testing.assert_close(gm(**batch).loss, loss, **TOLERANCE)


def test_a_prefix_is_seen_by_all_and_padding_by_none() -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, [Multiplex(2, demux="prefix")]).eval()
    batch = family.make_batch(batch=4)
    batch["attention_mask"] = (torch.arange(16) < 9).long().repeat(4, 1)
    other = dict(batch, input_ids=torch.where(batch["attention_mask"].bool(), batch["input_ids"], token_ids(4, 16)))
    assert torch.equal(gm(**batch).logits, gm(**other).logits)
    before = gm(**batch).logits
    with torch.no_grad():
        gm.get_parameter("multiplex.mux.index").add_(1)
    assert not torch.allclose(before, gm(**batch).logits)


@pytest.mark.parametrize("kind", ["gaussian", "attention", "orthogonal", "binary", "mlp"])
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_permuting_members_with_their_keys_permutes_outputs(name: str, kind: str) -> None:
    family, base = traced(name)
    options = {"demux": "mlp"} if kind == "mlp" else {"mux": kind}
    gm = fxsparse.rewrite(base, [Multiplex(3, **options)]).eval()
    batch = family.make_batch(batch=6)
    order = torch.tensor([1, 2, 0])
    rows = torch.cat([order, order + 3])
    before = gm(**batch).logits
    assert not torch.allclose(before[rows], gm(**{key: value[rows] for key, value in batch.items()}).logits)
    with torch.no_grad():
        for key, tensor in multiplexer_state(gm).items():
            if key in ("mux.keys", "demux.keys", "demux.scale", "demux.shift"):
                tensor.copy_(tensor[order].clone())
            elif key == "mux.weight":
                tensor.copy_(tensor.unflatten(1, (3, -1))[:, order].flatten(1))
            elif key.startswith("demux.linear"):
                tensor.copy_(tensor.unflatten(0, (3, -1))[order].flatten(0, 1))
    after = gm(**{key: value[rows] for key, value in batch.items()}).logits
    torch.testing.assert_close(after, before[rows], **TOLERANCE)


def test_contextual_mixing_of_a_causal_model_sees_no_future_and_of_bert_no_padding() -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, [Multiplex(2, mux="attention")]).eval()
    batch = family.make_batch(batch=4)
    later = batch["input_ids"].clone()
    later[:, 10:] = token_ids(4, 6)
    torch.testing.assert_close(gm(**batch).logits[:, :10], gm(**dict(batch, input_ids=later)).logits[:, :10])
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, [Multiplex(2, mux="attention")]).eval()
    batch = family.make_batch(batch=4) | {"attention_mask": (torch.arange(16) < 9).long().repeat(4, 1)}
    other = batch["input_ids"].clone()
    other[:, 9:] = token_ids(4, 7)
    torch.testing.assert_close(gm(**batch).logits, gm(**dict(batch, input_ids=other)).logits)


def test_keys_are_what_their_names_say() -> None:
    _, base = traced("bert")
    keys = {
        kind: fxsparse.rewrite(base, [Multiplex(3, mux=kind)]).get_parameter("multiplex.mux.keys")
        for kind in ("gaussian", "binary", "unit")
    }
    torch.testing.assert_close(keys["gaussian"].norm(dim=-1), torch.full((3,), 32**0.5))
    assert torch.equal(keys["binary"].sum(0), torch.ones(32)) and set(keys["binary"].unique().tolist()) == {0.0, 1.0}
    assert keys["binary"].sum(1).tolist() == [10, 10, 12] and bool((keys["unit"] == 1).all())
    assert not keys["gaussian"].requires_grad
    short = fxsparse.rewrite(base, [Multiplex(3, norm=2.0, learned=True, seed=3)]).get_parameter("multiplex.mux.keys")
    torch.testing.assert_close(short.norm(dim=-1), torch.full((3,), 2.0))
    assert short.requires_grad
    weight = fxsparse.rewrite(base, [Multiplex(3, mux="orthogonal")]).get_parameter("multiplex.mux.weight")
    for rotation in weight.split(32, 1):
        torch.testing.assert_close(rotation @ rotation.t(), torch.eye(32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "t5", "qwen2", "mistral", "roberta"])
def test_identical_members_in_other_families(name: str) -> None:
    family, base = traced(name)
    stack = "encoder.block" if name == "t5" else None
    gm = fxsparse.rewrite(base, [Multiplex(2, mux="unit", demux="repeat", stack=stack)]).eval()
    batch = family.make_batch(batch=3)
    pairs = {key: rows.repeat_interleave(2, 0) for key, rows in batch.items()}
    expected = base.eval()(**batch).logits.repeat_interleave(2, 0)
    torch.testing.assert_close(gm(**pairs).logits, expected, rtol=1e-5, atol=1e-6)
    assert len(gm(**batch).logits) == 3
    if name == "vit":
        with pytest.raises(RewriteError, match="looks none up"):
            fxsparse.rewrite(base, [Multiplex(2, stages=STAGES)])


# --- ragged batches and sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_ragged_batch_is_filled_with_its_own_rows_and_trimmed(name: str) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [Multiplex(3)]).eval()
    batch = family.make_batch(batch=4)
    output = gm(**batch).logits
    torch.randn(100)  # nothing drawn elsewhere matters
    assert torch.equal(output, gm(**batch).logits) and len(output) == 4
    whole = {key: torch.cat([rows, rows[:2]]) for key, rows in batch.items()}
    torch.testing.assert_close(output, gm(**whole).logits[:4])


@functools.cache
def of_any_length() -> GraphModule:
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, layerdrop=0.0, use_cache=False, num_labels=3, pad_token_id=1,
    )  # fmt: skip
    kwargs = {"input_ids": token_ids(4, 16), "labels": torch.randint(3, (4,))}
    return fxsparse.trace(transformers.OPTForSequenceClassification(config), kwargs=kwargs, dynamic_sequence=True)


@pytest.mark.parametrize("options", [{}, {"demux": "prefix", "stages": ((1, 0.5, 0.5),)}, {"ensemble": 2}])
def test_sequence_lengths_may_stay_free(options: dict[str, Any]) -> None:
    gm = fxsparse.rewrite(copy.deepcopy(of_any_length()), [Multiplex(2, **options)])
    for rows, length in ((5, 9), (3, 33), (1, 16)):
        output = gm(input_ids=token_ids(rows, length), labels=torch.randint(3, (rows,)))
        output.loss.backward()
        assert output.logits.shape == (rows, 3)


def test_members_share_the_union_of_their_masks() -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, [Multiplex(2)]).eval()
    batch = family.make_batch(batch=4)
    batch["attention_mask"] = (torch.arange(16) < torch.tensor([[3], [12], [5], [7]])).long()
    union = dict(batch, attention_mask=(torch.arange(16) < torch.tensor([[12], [12], [7], [7]])).long())
    assert torch.equal(gm(**batch).logits, gm(**union).logits)


def test_a_classification_head_tells_one_position_apart() -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, [Multiplex(3)])
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fxsparse.demux_linear.default)
    assert fx.value(node.args[0]).dim() == 2
    with FlopCounterMode(display=False) as counter:
        gm.eval()(**family.make_batch(batch=9))
    assert counter.get_flop_counts()["Global"][torch.ops.fxsparse.demux_linear] == 2 * (3 + 3) * 32 * 32
    counted = fxsparse.count_flops(gm, input_ids=(9, 16), attention_mask=(9, 16), labels=(9,)).forward
    alone = fxsparse.count_flops(base, input_ids=(9, 16), attention_mask=(9, 16), labels=(9,)).forward
    assert 1 / 3 < counted / alone < 0.36


@pytest.mark.parametrize("options", [{}, {"demux": "prefix"}, {"mux": "attention", "demux": "mlp"}])
def test_the_ledger_counts_what_torch_counts(options: dict[str, Any]) -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, [Multiplex(2, **options)])
    with sdpa_kernel(SDPBackend.MATH):
        loss = gm(**family.make_batch(batch=4)).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    graph = fxsparse.BackpropGraph(gm)
    assert graph.cost(set(graph.trainable)) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_heads_and_channels_of_the_core_are_found_as_before(name: str) -> None:
    _, base = traced(name)
    gm = fxsparse.rewrite(base, [Multiplex(2)])
    for find in (attentions, mlps):
        assert [item.path for item in find(gm)] == [item.path for item in find(base)]
    for ours, theirs in zip(attentions(gm), attentions(base), strict=True):
        rows = zip((*ours.projections, ours.output), (*theirs.projections, theirs.output), strict=True)
        assert all(torch.equal(a.index, b.index) for a, b in rows)


def test_other_passes_compose() -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, [DropLayers(indices=(1,)), Multiplex(2), InsertNMMasks("2:4")])
    assert all(entry.rewritten for entry in fxsparse.record_of(gm).entries)
    whole = fxsparse.rewrite(base, [Multiplex(2)])
    taught = fxsparse.rewrite(gm, [DistillLayers(whole, weights=(1.0, 0.5, 0.5))])
    batch = family.make_batch(batch=3)
    taught.train()(**batch).loss.backward()
    assert gradients(taught)["multiplex.demux.keys"].any()
    assert taught.eval()(**batch).logits.shape == (3, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {}),
        ("bert", {"mux": "orthogonal"}),
        ("bert", {"demux": "prefix"}),
        ("bert", {"stages": ((0.3, 0, 1), (1, 0.9, 0.1))}),
        ("opt", {}),
        ("opt", {"mux": "attention"}),
        ("opt", {"demux": "mlp"}),
    ],
    ids=str,
)
def test_hidden_dimensions_of_keys_and_demultiplexer_go_with_the_core(name: str, options: dict[str, Any]) -> None:
    family, gm = traced(name)
    units = ("heads", "attention", "intermediate", "ffn", "hidden")
    gates = Pipeline([Multiplex(2, **options), GateStructures(units, score="random", target=0.5)])(gm).eval()
    (gate,) = {item.hidden for item in gated(gates)}
    mask = gates.get_buffer(f"{gate}_mask")
    mask.zero_()[torch.randperm(len(mask))[:19]] = 1
    small = Pipeline([Materialize()])(gates)
    state = dict(small.named_parameters())
    if not options:
        out = 19 if name == "opt" else 32  # where the head is tied to the embeddings, all before it is the stream
        assert state["multiplex.mux.keys"].shape == state["multiplex.demux.keys"].shape == (2, 19)
        assert state["multiplex.demux.input.weight"].shape == (out, 38)
    for size in (2, 5):
        batch = family.make_batch(batch=size)
        for mine, its in zip(outputs(small, batch), outputs(gates, batch), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_gates_prune_a_multiplexed_core_and_what_they_close_is_cut(name: str) -> None:
    family, base = traced(name)
    whole = fxsparse.rewrite(base, [Multiplex(2)])
    gm = fxsparse.rewrite(whole, ["gates{target=0.6}", DistillLayers(whole)])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=3)
    for _ in range(3):
        (gm(**family.make_batch(batch=5)).loss + fxsparse.sparsity_loss(gm)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert all(torch.isfinite(parameter).all() for parameter in gm.parameters())
    small = fxsparse.rewrite(gm, "end-distill,materialize").eval()
    batch = family.make_batch(batch=5)
    assert small(**batch).logits.shape == gm.eval()(**batch).logits.shape
    counts = [fxsparse.record_of(model).entries[-1].after.parameters for model in (whole, small)]
    assert counts[1] < 0.8 * counts[0]


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_compiled_equals_eager_without_a_graph_for_each_batch_size(name: str) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [Multiplex(2)]).eval()
    compiled = torch.compile(gm, backend="aot_eager", dynamic=True)
    plain = torch.compile(base.eval(), backend="aot_eager", dynamic=True)
    graphs = []
    for model in (plain, compiled):
        torch._dynamo.utils.counters.clear()
        for rows in (6, 4, 7, 9, 16, 3):  # a single group is a size of 1, of which Dynamo makes a graph of its own
            batch = family.make_batch(batch=rows)
            outputs = model(**batch)
            eager = (gm if model is compiled else base)(**batch)
            torch.testing.assert_close(outputs.logits, eager.logits, **TOLERANCE)
            outputs.loss.backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] <= graphs[0]


@pytest.mark.inductor
def test_inductor_equals_eager() -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, [Multiplex(3)]).eval()
    compiled = torch.compile(gm, backend="fxsparse", dynamic=True)
    for rows in (6, 4):
        batch = family.make_batch(batch=rows)
        results = []
        for model in (gm, compiled):
            gm.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            results.append((loss.detach(), gradients(gm)["multiplex.demux.keys"].clone()))
        torch.testing.assert_close(results[0], results[1], **TOLERANCE)


# --- stages and ensembles ---------------------------------------------------------------------------------------------

STAGES = ((0.5, 0.0, 1.0), (1.0, 0.9, 0.1))


@pytest.mark.parametrize("demux", ["keys", "mlp", "prefix", "repeat"])
def test_the_loss_of_one_call_is_the_weighted_sum(demux: str) -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, [Multiplex(2, demux=demux, stages=STAGES, ignore=(5,))]).eval()
    plain = fxsparse.rewrite(base, [Multiplex(2, demux=demux)]).eval()
    plain.load_state_dict(gm.state_dict(), strict=False)
    batch = family.make_batch(batch=5)
    task = plain(**batch).loss
    assert torch.equal(gm(**batch).loss, task)
    losses = []
    for weights in ((0.0, 1.0), (1.0, 0.0), (0.9, 0.1)):
        gm.get_buffer("multiplex.loss_weights").copy_(torch.tensor(weights))
        gm.get_submodule("multiplex").training = True  # dropout stays off
        losses.append(gm(**batch).loss)
        gm.get_submodule("multiplex").training = False
    torch.testing.assert_close(losses[1], task)
    torch.testing.assert_close(losses[2], 0.9 * task + 0.1 * losses[0])
    if demux == "keys":
        torch.testing.assert_close(losses[0], retrieval_by_hand(gm, family.model.eval(), batch["input_ids"], 2))


def retrieval_by_hand(gm: GraphModule, model: nn.Module, ids: Tensor, n: int) -> Tensor:
    state, decoder = multiplexer_state(gm), model.model.decoder
    tokens = multiplexed.filled(ids, n)
    x = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[2 : 2 + ids.shape[1]]
    h = multiplexed.run_opt(decoder, multiplexed.mixed(x, state["mux.keys"]))
    apart = multiplexed.told_apart(h, state)
    asked, targets = [], []
    for group in range(len(h)):
        for position in range(h.shape[1]):
            mixed = (group * 73856093) ^ (position * 19349663) ^ 83492791  # of step 1
            mixed = (mixed ^ (mixed >> 13)) * 1274126177 & 0x7FFFFFFF
            member = (mixed ^ (mixed >> 16)) % n
            asked.append(apart[group * n + member, position])
            token = int(tokens[group * n + member, position])
            targets.append(-100 if token == 5 else token)
    scores = torch.stack(asked) @ state["retrieval.weight"].t() + state["retrieval.bias"]
    return cross_entropy(scores, torch.tensor(targets))


def test_a_schedule_moves_through_the_stages_and_resumes() -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, [Multiplex(2, stages=STAGES)])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=4)
    seen = []
    for step in range(1, 5):
        seen.append(tuple(gm.get_buffer("multiplex.loss_weights").tolist()))
        assert gm.get_buffer("multiplex.step").item() == step
        gm(**family.make_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == 2:
            state = schedule.state_dict()
    assert seen == [(0.0, 1.0)] * 2 + [pytest.approx((0.9, 0.1))] * 2
    again = fxsparse.Schedule(gm, optimizer, total_steps=4)
    assert gm.get_buffer("multiplex.step").item() == 1
    again.load_state_dict(state)
    assert gm.get_buffer("multiplex.step").item() == 3
    assert gm.get_buffer("multiplex.loss_weights").tolist() == pytest.approx([0.9, 0.1])


def test_retrieval_draws_every_member_and_can_be_learned() -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, [Multiplex(2, stages=((1.0, 0.0, 1.0),))])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=3e-3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=80)
    losses = []
    for _ in range(80):
        batch = family.make_batch(batch=16, seq=16)
        loss = gm(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert losses[-1] < 0.9 * losses[0]


def test_what_was_pretrained_multiplexed_is_tuned_with_another_head() -> None:
    _, base = traced("bert")
    tuned = fxsparse.rewrite(base, [Multiplex(2, stages=((1.0, 1.0, 0.0),))])
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    kwargs = {"input_ids": token_ids(4, 16), "labels": token_ids(4, 16)}
    language = transformers.BertForMaskedLM(config)
    pretrained = fxsparse.rewrite(language, [Multiplex(2, stages=STAGES, seed=1)], kwargs=kwargs)
    pretrained(**kwargs).loss.backward()  # retrieval, and the masked tokens from halfway on
    missing, unexpected = tuned.load_state_dict(pretrained.state_dict(), strict=False)
    assert all(name.startswith(("bert.pooler", "classifier")) for name in missing)
    assert all(name.startswith("cls.") for name in unexpected)
    assert torch.equal(tuned.get_parameter("multiplex.mux.keys"), pretrained.get_parameter("multiplex.mux.keys"))


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_an_ensemble_averages_what_its_slots_give(name: str) -> None:
    family, base = traced(name)
    plain = fxsparse.rewrite(base, [Multiplex(2)]).eval()
    ensemble = fxsparse.rewrite(base, [Multiplex(2, ensemble=2)]).eval()
    ensemble.load_state_dict(plain.state_dict())
    for rows in (4, 3):
        batch = family.make_batch(batch=rows)
        slots = {key: value.repeat_interleave(2, 0) for key, value in batch.items()}
        expected = plain(**slots).logits[: rows * 2].unflatten(0, (rows, 2)).mean(1)
        output = ensemble(**batch)
        torch.testing.assert_close(output.logits, expected, **TOLERANCE)
        if name == "bert":
            torch.testing.assert_close(output.loss, cross_entropy(expected, batch["labels"]), **TOLERANCE)


# --- record, text and files -------------------------------------------------------------------------------------------


def test_text_and_record() -> None:
    pipeline = fxsparse.Pipeline("multiplex{n=4,mux=attention,stages=[[0.5,0,1],[1,0.9,0.1]],ignore=[0,1]}")
    assert fxsparse.Pipeline.parse(str(pipeline)) == pipeline
    assert str(fxsparse.Pipeline([Multiplex(2)])) == "multiplex{n=2}"
    _, base = traced("bert")
    gm = fxsparse.rewrite(base, "multiplex{n=3}")
    (entry,) = fxsparse.record_of(gm).entries
    assert {change.site for change in entry.rewritten} == {"bert.encoder.layer", "multiplex"}
    assert "batch / 3" in str(entry.rewritten[0]) and "any of them may see" in str(entry.rewritten[0])
    assert entry.after.forward_flops < entry.before.forward_flops


def test_saved_loaded_and_replayed(tmp_path: Path) -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, [Multiplex(2, stages=STAGES)]).eval()
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    fxsparse.save(gm, tmp_path / "model.safetensors")
    batch = family.make_batch(batch=3, labels=False)
    serving = fxsparse.load(tmp_path / "model.safetensors", FAMILIES["bert"]().model, kwargs=batch).eval()
    batch = family.make_batch(batch=3)
    expected = gm(**batch).logits
    batch.pop("labels")
    torch.testing.assert_close(serving(**batch).logits, expected)
    assert set(fxsparse.dense_state_dict(gm)) == set(base.state_dict())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0 must be"),
        ({"n": 2.5}, "n=2.5 must be"),
        ({"mux": "gausian"}, "one of gaussian"),
        ({"demux": "rsa"}, "one of keys"),
        ({"n": 4, "ensemble": 3}, "does not divide"),
        ({"stages": ((0.5, 1, 0),)}, "whose ends grow and reach 1"),
        ({"stages": ((1, 1),)}, r"stages\[0\]=\(1, 1\) must be a list of 3"),
        ({"norm": 0.0}, "norm"),
        ({"mux": "attention", "demux": "prefix"}, "not a prefix"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Multiplex(**options)


def test_a_fixed_batch_is_refused() -> None:
    family = FAMILIES["opt"]()
    gm = fxsparse.trace(family.model, kwargs=family.make_batch(), dynamic_batch=False)
    with pytest.raises(RewriteError, match=r"batch dimension of \w+ is 4, not a symbol.*dynamic_batch=True"):
        fxsparse.rewrite(gm, [Multiplex(2)])


def test_an_example_of_one_group_is_refused() -> None:
    _, base = traced("bert")
    with pytest.raises(RewriteError, match="at least 5 rows"):
        fxsparse.rewrite(base, [Multiplex(4)])


def test_models_without_a_core_or_an_embedding_are_refused() -> None:
    _, base = traced("sequential")
    with pytest.raises(RewriteError, match="no repeated core"):
        fxsparse.rewrite(base, [Multiplex(2)])
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    with pytest.raises(RewriteError, match="there is no embedding: the core reads"):
        fxsparse.rewrite(encoder, [Multiplex(2)], (torch.randn(4, 8, 32),))


class Block(nn.Module):
    """Adds to the stream what a vector of the member's own scales."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, steer: Tensor) -> Tensor:
        return x + self.linear(x) * steer[:, None]


class Steered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids: Tensor, steer: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, steer)
        return x


def test_a_side_input_that_a_group_cannot_share_is_named() -> None:
    with pytest.raises(RewriteError, match="not just an attention mask"):
        fxsparse.rewrite(Steered(), [Multiplex(2)], (token_ids(4, 6) % 16, torch.randn(4, 8)))


def test_states_that_leave_the_core_are_named() -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    model = transformers.BertModel(config)
    config.output_hidden_states = True
    kwargs = {"input_ids": token_ids(4, 8) % 32}
    with pytest.raises(RewriteError, match=r"read outside it.*output_hidden_states=False"):
        fxsparse.rewrite(model, [Multiplex(2)], kwargs=kwargs)


def test_multiplexing_twice_and_several_stacks_are_refused() -> None:
    _, base = traced("bert")
    gm = fxsparse.rewrite(base, [Multiplex(2)])
    with pytest.raises(RewriteError, match="cannot follow"):
        fxsparse.rewrite(gm, [Multiplex(2)])
    with pytest.raises(RewriteError, match="no list of blocks at stack=nowhere"):
        fxsparse.rewrite(base, [Multiplex(2, stack="nowhere")])
    _, t5 = traced("t5")
    with pytest.raises(RewriteError, match=r"choose one with stack=encoder.block or stack=decoder.block"):
        fxsparse.rewrite(t5, [Multiplex(2)])
