"""Distillation: the loss in plain torch, CoFi's matching, and a teacher that stays out of the way."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import record_of
from fxsparse.graph.trainable import fully_trained, trainable, trained
from fxsparse.passes import (
    DistillLayers,
    DropLayers,
    EndDistillation,
    GateStructures,
    InsertNMMasks,
    Materialize,
    Pipeline,
)
from fxsparse.passes.distill.distill import attach_teacher
from fxsparse.passes.distill.losses import attention_matrix, layer_loss, layers_exist, match_layers
from tests.support.dropped import built_without
from tests.support.families import HIDDEN, draws_alike
from tests.support.traced import traced

DROPPED = {
    "bert": {"bert.encoder.layer": (1,)},
    "opt": {"model.decoder.layers": (1,)},
    "llama": {"model.layers": (1,)},
    "gpt2": {"transformer.h": (0,)},
    "vit": {"vit.layers": (1,)},
}


def matching_in_python(errors: list[list[float]], exists: list[bool]) -> list[int]:
    """CoFi's, from the last teacher layer down, never out of range."""
    last, chosen = len(exists), []
    for row in reversed(errors):
        below = [place for place in range(min(last, len(exists))) if exists[place]]
        last = min(below, key=row.__getitem__) if below else last
        chosen.append(min(last, len(exists) - 1))
    return chosen[::-1]


def test_matching_equals_the_rule_in_python() -> None:
    for trial in range(200):
        generator = torch.Generator().manual_seed(trial)
        teachers, students = (int(torch.randint(1, 7, (), generator=generator)) for _ in range(2))
        errors = torch.rand(teachers, students, generator=generator)
        exists = torch.rand(students, generator=generator) < 0.6
        chosen = match_layers(errors, exists)
        assert chosen.tolist() == matching_in_python(errors.tolist(), exists.tolist())
        assert ((chosen >= 0) & (chosen < students)).all()
        if exists.any():
            assert exists[chosen].all(), "a layer that does not exist was chosen"


def test_loss_of_layers_and_its_gradient() -> None:
    own = [torch.randn(3, 5, 8, requires_grad=True) for _ in range(4)]
    wanted = [torch.randn(3, 5, 8) for _ in range(2)]
    exists = torch.tensor([True, False, True, True])
    errors = [[F.mse_loss(mine, theirs).item() for mine in own] for theirs in wanted]
    chosen = matching_in_python(errors, exists.tolist())
    expected = sum(F.mse_loss(own[place], theirs) for place, theirs in zip(chosen, wanted, strict=True))
    expected_grad = torch.autograd.grad(expected, own, allow_unused=True)
    loss = layer_loss(own, wanted, exists)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(torch.autograd.grad(loss, own), expected_grad, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)
    nothing = layer_loss(own, wanted, torch.zeros(4, dtype=torch.bool))
    assert nothing.item() == 0


def test_a_layer_exists_while_one_sublayer_is_open() -> None:
    on, off, heads = torch.ones(1), torch.zeros(1), torch.tensor([0.0, 0.3])
    layers = [[[on, heads], [off]], [[on, off], [off]], [], [[off, heads], [on]]]
    assert layers_exist(layers, torch.device("cpu")).tolist() == [True, False, True, True]


def in_plain_torch(
    student: nn.Module, teacher: nn.Module, batch: dict[str, Any], weights: tuple[float, float, float], dynamic: bool
) -> Tensor:
    out = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        wanted = teacher.eval()(**batch, output_hidden_states=True)
    own, theirs = list(states_of(student, out))[1:], list(states_of(teacher, wanted))[1:]
    temperature = 3.0
    soft = F.softmax(wanted.logits / temperature, -1)
    rows = soft[..., 0].numel()
    gap = soft.clamp_min(1e-30).log() - F.log_softmax(out.logits / temperature, -1)
    divergence = (soft * gap).sum() / rows * temperature**2
    if dynamic:
        errors = [[F.mse_loss(mine, their).item() for mine in own] for their in theirs]
        places = matching_in_python(errors, [True] * len(own))
        hidden = sum(F.mse_loss(own[place], their) for place, their in zip(places, theirs, strict=True))
    else:
        pairs = zip(own, [theirs[(i + 1) * len(theirs) // len(own) - 1] for i in range(len(own))], strict=True)
        hidden = sum(F.mse_loss(mine, their) for mine, their in pairs)
    return weights[0] * out.loss + weights[1] * divergence + weights[2] * hidden


def states_of(model: nn.Module, output: Any) -> list[Tensor]:
    """Hidden states before and after every layer; Hugging Face gives the last one after the final norm."""
    found: list[Tensor] = []
    return list(model.streams) if hasattr(model, "streams") else found or list(output.hidden_states)


def watched(model: nn.Module, path: str) -> nn.Module:
    """A copy of ``model`` that keeps the hidden states around its layers."""
    model = copy.deepcopy(model)
    model.streams = []
    first = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
    layers = model.get_submodule(path)
    model.register_forward_pre_hook(lambda *_: model.streams.clear())
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: model.streams.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: model.streams.append(first(out)))
    return model


@pytest.mark.parametrize("matching", ["dynamic", "plain"])
@pytest.mark.parametrize("name", DROPPED)
def test_loss_equals_the_one_in_plain_torch(name: str, matching: str) -> None:
    family, base = traced(name)
    if not draws_alike(base):
        pytest.skip("the original draws other random numbers than the graph")
    teachers, graph = traced(name)  # as a graph, so that nothing is captured again
    teacher = teachers.model
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    weights = (0.25, 0.5, 0.75)
    item = DistillLayers(graph, matching=matching, temperature=3.0, weights=weights)
    gm = fxsparse.rewrite(base, [DropLayers(indices=DROPPED[name]), item])
    ((path, _),) = DROPPED[name].items()
    student = watched(built_without(family.model, DROPPED[name]), path).train()
    reference = watched(teacher, path)
    batch = family.make_batch(batch=3)
    torch.manual_seed(1)
    expected = in_plain_torch(student, reference, batch, weights, matching == "dynamic")
    expected.backward()
    norms = sorted(p.grad.norm().item() for p in student.parameters() if p.grad is not None)
    for call in (gm, torch.compile(gm, backend="aot_eager")):
        gm.train(), gm.zero_grad()
        torch.manual_seed(1)
        loss = call(**batch).loss
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        loss.backward()
        ours = sorted(p.grad.norm().item() for p in gm.parameters() if p.grad is not None)
        torch.testing.assert_close(ours, norms, rtol=1e-3, atol=1e-6)
    gm.eval()
    assert torch.equal(gm(**batch).loss, built_without(family.model, DROPPED[name]).eval()(**batch).loss)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_encoder_and_decoder_are_both_distilled() -> None:
    family, base = traced("t5")
    item = DistillLayers(base, matching="plain", weights=(0.0, 0.0, 1.0))
    gm = fxsparse.rewrite(base, [DropLayers(indices=(1,)), item])
    assert {change.site for change in record_of(gm).entries[-1].rewritten} >= {"encoder.block", "decoder.block"}
    loss = gm.train()(**family.make_batch()).loss
    loss.backward()
    assert gm.get_parameter("encoder.block.0.layer.0.SelfAttention.q.weight").grad.abs().sum() > 0
    assert gm.get_parameter("decoder.block.0.layer.0.SelfAttention.q.weight").grad.abs().sum() > 0


def test_a_teacher_of_the_same_parameters_is_copied_with_a_warning_and_left_alone_beside_a_copy() -> None:
    _, base = traced("opt")
    passes = [DropLayers(indices=(1,)), DistillLayers(base)]
    with pytest.warns(UserWarning, match=r"distill: the teacher shares \S+ and \d+ more .*copy=True"):
        gm = fxsparse.rewrite(base, passes)
    own = {id(parameter) for parameter in base.parameters()}
    taught = [id(parameter) for parameter in gm.distillation.held.module.parameters()]
    assert taught and not own.intersection(taught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxsparse.rewrite(base, passes, copy=True)
    assert own.issuperset(map(id, gm.distillation.held.module.parameters()))
    assert not own.intersection(map(id, gm.parameters()))


@pytest.mark.filterwarnings("ignore:distill. the teacher shares")
def test_the_teacher_is_in_no_state_and_does_not_move() -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, [DropLayers(indices=(1,)), DistillLayers(base, projection="shared")])
    plain = fxsparse.rewrite(base, [DropLayers(indices=(1,))])
    extra = {"distillation.projections.0.0.weight", "distillation.projections.0.0.bias"}
    assert set(gm.state_dict()) - set(plain.state_dict()) == extra
    assert {name for name, _ in gm.named_parameters()} - {name for name, _ in plain.named_parameters()} == extra
    teacher = gm.distillation.held.module
    before = copy.deepcopy(dict(teacher.named_parameters()))
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    losses = []
    batch = family.make_batch()
    gm.eval(), gm.distillation.train()  # the loss of training without its dropout
    for _ in range(12):
        loss = gm(**batch).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in gm.parameters()}
    again = copy.deepcopy(gm)
    assert again.distillation.held.module is teacher


def test_projection_to_another_width() -> None:
    family, base = traced("bert")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    teacher = transformers.BertForSequenceClassification(config)
    with pytest.raises(RewriteError, match=r"32 wide and the teacher's 48; give projection='shared'"):
        fxsparse.rewrite(base, [DistillLayers(teacher)])
    teacher = fxsparse.trace(teacher, kwargs=family.make_batch())
    for projection, count in (("shared", 1), ("per-layer", 3)):
        gm = fxsparse.rewrite(base, [DistillLayers(teacher, projection=projection)])
        shapes = [tuple(p.shape) for n, p in gm.named_parameters() if n.startswith("distillation") and p.dim() == 2]
        assert shapes == [(48, HIDDEN)] * count
        gm.train()(**family.make_batch()).loss.backward()
        grads = [p.grad.abs().sum() for n, p in gm.named_parameters() if n.startswith("distillation")]
        assert max(grads) > 0


def test_save_load_and_give_the_teacher_back(tmp_path: Any) -> None:
    family, base = traced("opt")
    fresh = copy.deepcopy(family.model)
    gm = fxsparse.rewrite(base, [DropLayers(indices=(1,)), DistillLayers(base, projection="per-layer")])
    nn.init.normal_(gm.get_parameter("distillation.projections.0.1.weight"))
    fxsparse.save(gm, tmp_path / "student.safetensors")
    batch = family.make_batch()
    loaded = fxsparse.load(tmp_path / "student.safetensors", fresh, kwargs=batch)
    assert torch.equal(loaded.eval()(**batch).loss, gm.eval()(**batch).loss)
    loaded.distillation.train()
    with pytest.raises(RewriteError, match=r"attach_teacher"):
        loaded(**batch)
    attach_teacher(loaded, family.model)
    gm.distillation.train()
    torch.testing.assert_close(loaded(**batch).loss, gm(**batch).loss)


def test_composes_with_masks_and_ends() -> None:
    family, base = traced("llama")
    gm = fxsparse.rewrite(base, [InsertNMMasks("2:4"), DistillLayers(base)])
    gm.train()(**family.make_batch()).loss.backward()
    ended = fxsparse.rewrite(gm, [EndDistillation()]).eval()
    batch = family.make_batch(batch=2)
    assert torch.equal(ended(**batch).loss, gm.eval()(**batch).loss)
    assert not hasattr(ended, "distillation") and hasattr(gm, "distillation")
    assert torch.equal(ended.train()(**batch).loss, fxsparse.rewrite(base, "nm-masks").train()(**batch).loss)


def test_distilling_anew_after_the_gates_are_cut() -> None:
    """CoFi distils into the pruned model too: cutting ends the distillation, and another may follow."""
    family, base = traced("bert")
    passes = [GateStructures(score="magnitude", target=0.4), DistillLayers(traced("bert")[1])]
    gates = fxsparse.rewrite(base, passes)
    with pytest.raises(RewriteError, match="cannot follow distill"):
        fxsparse.rewrite(gates, [DistillLayers(family.model)])
    small = fxsparse.rewrite(gates, [Materialize()])
    assert not any(name.startswith("distillation") or "gate" in name for name, _ in small.named_modules())
    batch = family.make_batch(batch=3)
    task = small.eval()(**batch).loss
    torch.testing.assert_close(task, fxsparse.rewrite(gates, "end-distill").eval()(**batch).loss)
    for name in ("materialize", "end-distill"):
        with pytest.raises(RewriteError, match="did not run before"):
            fxsparse.rewrite(small, name)
    again = fxsparse.rewrite(small, [DistillLayers(family.model)])
    torch.testing.assert_close(again.eval()(**batch).loss, task)
    assert again.train()(**batch).loss.isfinite()
    assert not torch.isclose(again(**batch).loss, task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matching": "random"}, "one of dynamic, plain"),
        ({"projection": "linear"}, "one of none, shared"),
        ({"temperature": 0}, "a number above 0"),
        ({"weights": (1, 0, 0)}, "one of the last two"),
        ({"teacher": "bert"}, "must be of type Module"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DistillLayers(**options)


def test_refusals() -> None:
    _, base = traced("opt")
    for item, message in (
        (DistillLayers(), "needs a teacher"),
        (DistillLayers(base, teacher_layers=(3,)), "numbers of the teacher's 3 layers"),
        (DistillLayers(base, matching="plain", teacher_layers=(0, 1)), "each of the 3 layers"),
    ):
        with pytest.raises(RewriteError, match=message):
            fxsparse.rewrite(base, [item])
    with pytest.raises(RewriteError, match="cannot follow distill; the order that works is drop-layers,distill"):
        fxsparse.rewrite(base, [DistillLayers(base), DropLayers(count=1)])
    with pytest.raises(RewriteError, match="trace it with labels"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        fxsparse.rewrite(model, [DistillLayers(copy.deepcopy(model))], (torch.randn(3, 4),))


def test_text_form() -> None:
    item = DistillLayers(matching="plain", weights=(1.0, 0.5, 0.0), teacher_layers={"encoder.*": (1,)})
    assert Pipeline.parse(str(Pipeline(item))).passes == (item,)


# --- attention matrices and embeddings --------------------------------------------------------------------------------

CHOP = {"matching": "plain", "weights": (0.3, 0.0, 0.7), "attention": 0.5, "embedding": 0.4}


def shown(model: nn.Module, batch: dict[str, Any]) -> Any:
    """The outputs with attention matrices as Hugging Face gives them; in evaluation mode, so without dropout."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    return model(**batch, output_attentions=True, output_hidden_states=True)


def attended(output: Any) -> list[list[Tensor]]:
    """By stack the attention matrices, in the order of execution."""
    if "encoder_attentions" not in output:
        return [list(output.attentions)]
    pairs = zip(output.decoder_attentions, output.cross_attentions, strict=True)
    return [list(output.encoder_attentions), [matrix for pair in pairs for matrix in pair]]


def embedded(output: Any) -> list[Tensor]:
    if "encoder_hidden_states" in output:
        return [output.encoder_hidden_states[0], output.decoder_hidden_states[0]]
    return [output.hidden_states[0]]


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "llama", "t5"])
def test_attention_matrices_and_embeddings_are_those_of_the_models(name: str) -> None:
    """Padding masks, causal masks, grouped queries, added positions without a scale, and attention to an encoder."""
    family, base = traced(name)
    _, graph = traced(name)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher = copy.deepcopy(family.model)
    teacher.load_state_dict(graph.state_dict(), strict=False)
    gm = fxsparse.rewrite(base, [DistillLayers(graph, **{**CHOP, "weights": (0.3, 0.0, 0.0)})])
    assert "attention matrices x 0.5, embeddings x 0.4" in record_of(gm).entries[0].rewritten[0].detail
    batch = family.make_batch(batch=3)
    student = shown(family.model, batch)
    with torch.no_grad():
        wanted = shown(teacher, batch)
    matrices = sum(
        F.mse_loss(mine, theirs)
        for ours, others in zip(attended(student), attended(wanted), strict=True)
        for mine, theirs in zip(ours, others, strict=True)
    )
    stems = sum(F.mse_loss(mine, theirs) for mine, theirs in zip(embedded(student), embedded(wanted), strict=True))
    assert matrices.item() > 1e-7 and stems.item() > 1e-4
    expected = 0.3 * student.loss + 0.5 * matrices + 0.4 * stems
    gm.eval(), gm.distillation.train()
    for call in (gm, torch.compile(gm, backend="aot_eager")) if name == "bert" else (gm,):
        torch.testing.assert_close(call(**batch).loss, expected, rtol=1e-5, atol=1e-7)
    parameters = dict(gm.named_parameters())
    grads = dict(zip(parameters, torch.autograd.grad(gm(**batch).loss, parameters.values()), strict=True))
    assert sum(grad.abs().sum() > 0 for grad in grads.values()) > len(grads) // 2


def test_gradients_of_attention_matrices_are_those_of_autograd() -> None:
    query, key = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, 6, 8, requires_grad=True)
    mask = torch.rand(2, 1, 5, 6) < 0.7
    mask[0, 0, 2] = False  # a query that attends nothing
    matrix = attention_matrix(query, key, mask, False, 0.3)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, 1)) * 0.3
    weights = scores.exp() * mask
    expected = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(matrix, expected)
    assert not matrix[0, :, 2].any()
    dy = torch.randn_like(matrix)
    torch.testing.assert_close(
        torch.autograd.grad(matrix, (query, key), dy), torch.autograd.grad(expected, (query, key), dy)
    )
    causal = attention_matrix(query, key[..., :5, :], None, True, None)
    assert (causal.triu(1) == 0).all()
    torch.testing.assert_close(causal.sum(-1), torch.ones(2, 4, 5))


def test_chops_projections_and_the_way_back_from_a_checkpoint(tmp_path: Any) -> None:
    family, base = traced("opt")
    fresh = copy.deepcopy(family.model)
    item = DistillLayers(base, projection="per-layer", **CHOP)
    assert Pipeline.parse(str(item)) == Pipeline(item)
    gm = fxsparse.rewrite(base, [DropLayers(indices=(1,)), item])
    assert len(gm.distillation.projections[0]) == 2 + 1
    nn.init.normal_(gm.get_parameter("distillation.projections.0.2.weight"))
    batch = family.make_batch()
    gm.train()(**batch).loss.backward()
    assert all(parameter.grad.any() for parameter in gm.distillation.parameters())
    fxsparse.save(gm, tmp_path / "student.safetensors")
    loaded = fxsparse.load(tmp_path / "student.safetensors", fresh, kwargs=batch)
    attach_teacher(loaded, family.model)
    gm.eval(), gm.distillation.train(), loaded.eval(), loaded.distillation.train()
    torch.testing.assert_close(loaded(**batch).loss, gm(**batch).loss)
    ended = fxsparse.rewrite(gm, [EndDistillation()])
    plain = fxsparse.rewrite(traced("opt")[1], [DropLayers(indices=(1,))])
    assert [node.target for node in ended.graph.nodes] == [node.target for node in plain.graph.nodes]


def test_a_shared_projection_serves_embeddings_too() -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, [DistillLayers(base, projection="shared", weights=(0, 0, 0), embedding=1.0)])
    (projection,) = gm.distillation.projections[0]
    gm.train()(**family.make_batch()).loss.backward()
    assert projection.bias.grad.any()


def test_what_attention_distillation_refuses() -> None:
    _, base = traced("bert")
    with pytest.raises(OptionError, match='use matching="plain"'):
        DistillLayers(attention=1.0)
    for option in ("attention", "embedding"):
        with pytest.raises(OptionError, match=f"{option}=-1.0 must be a number of at least 0"):
            DistillLayers(matching="plain", **{option: -1.0})
    narrow = fxsparse.rewrite(base, "gates{units=[heads],target=0.3,score=magnitude},materialize")
    with pytest.raises(RewriteError, match="compared head by head"):
        fxsparse.rewrite(narrow, [DistillLayers(base, **CHOP)])


def test_attention_matrices_of_a_softmax_are_those_of_fused_attention() -> None:
    family, base = traced("bert")
    config = copy.deepcopy(family.model.config)
    config._attn_implementation = "eager"
    model = type(family.model)(config)
    model.load_state_dict(family.model.state_dict())
    item = DistillLayers(base, matching="plain", weights=(1, 0, 0), attention=1.0)
    gm = fxsparse.rewrite(fxsparse.trace(model, kwargs=family.make_batch()), [item])
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    gm.eval(), gm.distillation.train()
    batch = family.make_batch()
    batch.pop("attention_mask")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    torch.testing.assert_close(gm(**batch).loss, family.model.eval()(**batch).loss)
    query = "bert.encoder.layer.1.attention.self.query.weight"
    with torch.no_grad():
        gm.get_parameter(query).mul_(8)
    # The matrices of the last layer differ, and its student's loss is that of the fused student's.
    fused = fxsparse.rewrite(traced("bert")[1], [item])
    fused.eval(), fused.distillation.train()
    with torch.no_grad():
        fused.get_parameter(query).copy_(gm.get_parameter(query))
    torch.testing.assert_close(gm(**batch).loss, fused(**batch).loss)
    assert not torch.isclose(gm(**batch).loss, model.eval()(**batch).loss, rtol=1e-5, atol=1e-7)


def test_attention_is_not_compared_where_heads_are_left_out() -> None:
    family, base = traced("opt")
    item = DistillLayers(traced("opt")[1], **CHOP)
    gm = fxsparse.rewrite(base, [item, "select-neurons{omission=0.5}"])
    skipped = {change.site: change.detail for change in record_of(gm).entries[-1].skipped}
    assert sum("is also read by distillation" in detail for detail in skipped.values()) == 3
    gm.train()(**family.make_batch()).loss.backward()
    with pytest.raises(RewriteError, match=r"distill: does not go with an earlier pass.*also read by distillation"):
        fxsparse.rewrite(traced("opt")[1], ["select-neurons{omission=0.5}", item])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {"weights": (1.0, 0.5, 1.0), "projection": "shared"}),
        ("opt", {"matching": "plain", "weights": (1, 1, 1), "projection": "per-layer", "attention": 1, "embedding": 1}),
    ],
)
def test_a_step_costs_what_the_counter_counts(name: str, options: dict[str, Any]) -> None:
    """The teacher, attention matrices and projections included, for any tensors that are trained, at other sizes."""
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [DistillLayers(base, **options)]).train()
    graph = BackpropGraph(gm)
    assert not fxsparse.count_flops(gm).uncounted
    batch = family.make_batch(batch=3, seq=12)
    sizes = {key: tuple(value.shape) for key, value in batch.items()}
    names = sorted(graph.trainable)
    projections = [name for name in names if name.startswith("distillation.") and name.endswith("weight")]
    assert projections
    for chosen in (names, projections, names[:1], [*names[::7], projections[-1]]):
        for parameter_name, parameter in gm.named_parameters():
            parameter.requires_grad_(parameter_name in chosen)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = gm(**batch).loss
            forward = counter.get_total_flops()
            loss.backward()
        assert graph.forward(**sizes) == forward
        assert graph.cost(chosen, **sizes) == counter.get_total_flops() - forward
        symbols = {
            symbol: fxsparse.count_flops(gm, **sizes).sizes[str(symbol)] for symbol in graph.expression().free_symbols
        }
        assert graph.expression().xreplace(symbols) == forward


def test_tensors_are_selected_beside_a_teacher() -> None:
    """Projections are among them; what is not chosen is not trained."""
    family, base = traced("opt")
    item = DistillLayers(base, weights=(0.5, 0.2, 1.0), projection="per-layer")
    gm = fxsparse.rewrite(base, [item, "select-tensors{rho=0.85,every=1}"]).train()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=2)
    batch = family.make_batch()
    schedule.observe(batch)
    chosen = set(trained(gm))
    everything = {name for name, _ in gm.named_parameters()}
    assert chosen and chosen < everything
    before = {name: parameter.detach().clone() for name, parameter in gm.named_parameters()}
    gm(**batch).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in gm.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and moved <= chosen
    full = BackpropGraph(fully_trained(gm), trainable=trainable(gm))
    budget = full.budget(0.85)
    assert full.cost(chosen) <= budget < full.full()
