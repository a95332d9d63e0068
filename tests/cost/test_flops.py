"""FLOPs against torch's own counter, operator by operator, and what `count_flops` reports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.cost.backprop import BackpropGraph
from fxsparse.cost.flops import count_flops, step_flops
from fxsparse.cost.formulas import formula
from fxsparse.errors import OptionError, RewriteError
from fxsparse.ops import low_rank, masked_linear, nm_linear
from fxsparse.ops.nm import Pattern, nm_mask, pack
from fxsparse.rewriting import rewrite
from fxsparse.tracing.trace import trace
from tests.support.experts import Mixture
from tests.support.traced import traced


class Operator(nn.Module):
    """One function of parameters; a batch that it does not use makes it a model."""

    def __init__(self, function: Callable[..., Tensor], shapes: Sequence[Sequence[int]]):
        super().__init__()
        self.function = function
        self.p = nn.ParameterList([nn.Parameter(torch.randn(*shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.p).sum() + x.sum()


def measured(gm: GraphModule, trained: Sequence[str], *args: Any, **kwargs: Any) -> tuple[int, int]:
    """What torch's counter sees of the forward and of the backward pass."""
    for name, parameter in gm.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.grad = None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = gm(*args, **kwargs)
        forward = counter.get_total_flops()
        loss = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output["loss"]
        if loss.requires_grad:
            loss.backward()
    return forward, counter.get_total_flops() - forward


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [chosen for length in range(len(names) + 1) for chosen in itertools.combinations(names, length)]


OPERATORS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (F.linear, [(3, 5, 7), (4, 7), (4,)]),
    "linear without bias": (F.linear, [(5, 7), (4, 7)]),
    "mm": (torch.mm, [(3, 5), (5, 7)]),
    "addmm": (torch.addmm, [(7,), (3, 5), (5, 7)]),
    "bmm": (torch.bmm, [(2, 3, 5), (2, 5, 7)]),
    "baddbmm": (torch.baddbmm, [(2, 3, 7), (2, 3, 5), (2, 5, 7)]),
    "matmul folded": (torch.matmul, [(2, 3, 5), (5, 7)]),
    "matmul broadcast": (torch.matmul, [(4, 1, 3, 5), (2, 5, 7)]),
    "matmul of one tensor": (lambda a: torch.matmul(a, a), [(4, 3, 3)]),
    "einsum pair": (lambda a, b: torch.einsum("bid,bjd->bij", a, b), [(2, 3, 5), (2, 7, 5)]),
    "einsum summed label": (lambda a, b: torch.einsum("bid,jd->bj", a, b), [(2, 3, 5), (7, 5)]),
    "einsum ellipsis": (lambda a, b: torch.einsum("...ij,...jk", a, b), [(2, 1, 3, 5), (4, 5, 7)]),
    "einsum elementwise": (lambda a, b: torch.einsum("bi,bi->bi", a, b), [(2, 3), (2, 3)]),
    "einsum of one": (lambda a: torch.einsum("bij->bji", a), [(2, 3, 4)]),
    "einsum chain": (lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c), [(2, 3), (3, 5), (5, 7)]),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), [(2, 3, 11), (4, 3, 3), (4,)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), [(2, 3, 8, 9), (4, 3, 3, 3), (4,)]),
    "conv3d": (F.conv3d, [(2, 3, 5, 5, 5), (4, 3, 2, 2, 2)]),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w, stride=2), [(2, 3, 5), (3, 4, 3)]),
    "conv_transpose2d": (lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), [(2, 3, 5, 6), (3, 4, 3, 3), (4,)]),
    "attention": (F.scaled_dot_product_attention, [(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), (2, 1, 5, 7)]),
    "grouped attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True),
        [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)],
    ),
    "tensordot, which has no formula": (lambda a, b: torch.tensordot(a, b, [[1, 2], [1, 0]]), [(3, 4, 5), (5, 4, 6)]),
    "norms, activations and losses": (
        lambda a, b: F.cross_entropy(F.gelu(F.layer_norm(a, (5,), b)).softmax(-1), torch.arange(3)),
        [(3, 5), (5,)],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_costs_what_the_counter_counts_for_every_set_of_gradients(name: str) -> None:
    function, shapes = OPERATORS[name]
    gm = trace(Operator(function, shapes), (torch.randn(2, 3),))
    graph = BackpropGraph(gm)
    for trained in subsets([name for name, _ in gm.named_parameters()]):
        forward, backward = measured(gm, trained, torch.randn(2, 3))
        assert graph.forward() == forward
        assert graph.cost(trained) == backward, trained


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (torch.mv, [(3, 5), (5,)], 30),
        (torch.dot, [(5,), (5,)], 10),
        (F.linear, [(5,), (4, 5)], 40),
        (torch.addmv, [(3,), (3, 5), (5,)], 30),
        (torch.addbmm, [(3, 7), (2, 3, 5), (2, 5, 7)], 420),
    ],
)
def test_products_count_that_torch_counts_as_nothing(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], flops: int
) -> None:
    gm = trace(Operator(function, shapes), (torch.randn(2, 3),))
    last = f"p.{len(shapes) - 1}"
    assert (BackpropGraph(gm).forward(), BackpropGraph(gm).cost({last})) == (flops, flops)


def test_a_grouped_convolution_costs_a_group_of_channels_each() -> None:
    gm = trace(Operator(lambda x, w: F.conv2d(x, w, groups=3), [(2, 6, 8, 8), (9, 2, 3, 3)]), (torch.randn(2, 3),))
    graph, expected = BackpropGraph(gm), 2 * (2 * 9 * 6 * 6) * (2 * 3 * 3)
    assert graph.forward() == expected == measured(gm, [], torch.randn(2, 3))[0]
    assert graph.cost({"p.0"}) == expected == measured(gm, ["p.0"], torch.randn(2, 3))[1]
    assert graph.cost({"p.1"}) == expected  # torch's counter says three times that


def test_experts_cost_what_the_tokens_routed_to_them_do() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, use_cache=False))  # type: ignore[arg-type]
    ids = torch.randint(2, 64, (3, 5))
    count = count_flops(trace(model, kwargs={"input_ids": ids, "labels": ids}))
    experts = next(cost for path, cost in count.modules.items() if path.endswith("experts"))
    assert experts.forward == 2 * (3 * 5 * 2) * 3 * 32 * 48
    assert experts.backward == 2 * experts.forward
    assert not count.uncounted


@pytest.mark.parametrize("passes", ["", "nm-masks{keep_first=false,keep_head=false}"])
def test_experts_cost_the_same_however_their_products_are_written(passes: str) -> None:
    """Forward and backward; n:m experts multiply by what is kept, and dW is computed whole."""
    rows, each = 3 * 4 * 2, 16 * 24
    for form in ("grouped", "gathered"):
        gm = trace(Mixture(form), (torch.randn(3, 4, 12),))
        gm = rewrite(gm, passes) if passes else gm
        graph, suffix = BackpropGraph(gm), "_values" if passes else ""
        kept = 2 if passes else 1
        linears = 2 * 12 * (12 * 16 + 16 * 5 + 16 * 7)
        assert graph.forward() == (linears + 2 * 2 * rows * each) // kept
        through = (2 * 12 * 16 * 7) // kept  # dx of the last linear
        assert graph.cost({f"down_proj{suffix}"}) == through + 2 * rows * each
        assert graph.cost({f"up_proj{suffix}"}) == through + (2 * rows * each) // kept + 2 * rows * each


# --- sparse operators -------------------------------------------------------------------------------------------------


class Sparse(nn.Module):
    """A dense linear, and every fxsparse linear after it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 24)
        pattern, weight = Pattern(2, 4), torch.randn(32, 24)
        values, indices = pack(weight, nm_mask(weight, pattern), pattern)
        self.values = nn.Parameter(values)
        self.register_buffer("indices", indices)
        self.bias, self.down, self.up = (nn.Parameter(torch.randn(*shape)) for shape in [(32,), (3, 24), (32, 3)])
        self.weight, self.down2, self.up2 = (nn.Parameter(torch.randn(*shape)) for shape in [(8, 32), (2, 32), (8, 2)])
        self.register_buffer("mask", torch.rand(8, 32) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        y = low_rank.nm_linear_low_rank(x, self.values, self.indices, None, self.down, self.up, self.bias, 2, 4)
        y = y + nm_linear.nm_linear(x, self.values, self.indices, None, None, 2, 4)
        z = masked_linear.masked_linear(y, self.weight, self.mask, None, None)
        z = z * low_rank.masked_linear_low_rank(y, self.weight, self.mask, None, self.down2, self.up2, None)
        return z.sum()


def test_sparse_operators_cost_what_the_counter_counts() -> None:
    gm = trace(Sparse(), (torch.randn(3, 5, 16),))
    graph = BackpropGraph(gm)
    names = [name for name, _ in gm.named_parameters()]
    for trained in [chosen for chosen in subsets(names) if len(chosen) in {0, 1, 2, len(names)}]:
        x = torch.randn(4, 5, 16)
        assert (graph.forward(x=x), graph.cost(trained, x=x)) == measured(gm, trained, x), trained


def test_a_compressed_weight_halves_two_of_three_products() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.randn(32, 12))
            self.register_buffer("indices", torch.full((32, 3), 0x44, dtype=torch.uint8))

        def forward(self, x: Tensor) -> Tensor:
            return nm_linear.nm_linear(torch.relu(x), self.values, self.indices, None, None, 2, 4)

    graph = BackpropGraph(trace(Model(), (torch.randn(6, 24),)))
    assert (graph.forward(), graph.cost({"values"})) == (6 * 32 * 24, 2 * 6 * 32 * 24)


# --- sizes ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).movedim(-2, 1).unbind(-2)
        return F.mse_loss(self.out(F.scaled_dot_product_attention(q, k, v).movedim(1, -2).flatten(-2)), target)


def attention(batch: int, tokens: int) -> GraphModule:
    x = torch.randn(batch, tokens, 16)
    dynamic = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in ("x", "target")}
    program = torch.export.export(Attention(), (), {"x": x, "target": x}, dynamic_shapes=dynamic, strict=False)
    return program.module(check_guards=False)


def attention_flops(batch: int, tokens: int) -> int:
    return 2 * batch * tokens * 16 * (48 + 16) + 2 * 2 * batch * tokens * tokens * 16


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 9), (8, 128)])
def test_one_graph_counts_any_batch_and_any_length(batch: int, tokens: int) -> None:
    gm = attention(2, 5)
    graph, x = BackpropGraph(gm), torch.randn(batch, tokens, 16)
    names = [name for name, _ in gm.named_parameters()]
    assert graph.forward(x=(batch, tokens, 16)) == attention_flops(batch, tokens)
    assert measured(gm, names, x=x, target=x) == (graph.forward(x=x, target=x), graph.cost(names, x=x, target=x))


def test_expressions_are_the_numbers_at_every_size() -> None:
    gm = attention(2, 5)
    graph = BackpropGraph(gm)
    names = [name for name, _ in gm.named_parameters()]
    for expression, count in [(graph.expression(), graph.forward), (graph.expression(names), graph.full)]:
        batch, tokens = sorted(expression.free_symbols, key=str)
        if gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0].node.expr == tokens:
            batch, tokens = tokens, batch
        assert expression.subs({batch: 3, tokens: 11}) == count(x=(3, 11, 16))


def test_sizes_default_to_the_example_and_a_dimension_may_stay() -> None:
    graph = BackpropGraph(attention(2, 5))
    assert graph.forward() == graph.forward(x=(2, 5, 16)) == attention_flops(2, 5)
    assert graph.forward(x=(7, None, 16)) == attention_flops(7, 5)


def test_an_unnamed_input_follows_the_named_one() -> None:
    _, gm = traced("bert")
    sizes = count_flops(gm, input_ids=(6, 11)).sizes
    assert set(sizes.values()) == {6, 11}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"input": (2, 5, 16)}, "no input and no size of that name"),
        ({"targt": (2, 5, 16)}, "did you mean target"),
        ({"x": (2, 5)}, "3 dimensions, 2 sizes"),
        ({"x": (2, 5, 17)}, "fixed size 16"),
        ({"x": (2, 0, 16)}, "positive integer"),
        ({"x": (2, 5, 16), "target": (2, 4, 16)}, "contradicts"),
    ],
)
def test_sizes_the_graph_does_not_have_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        count_flops(attention(2, 5), **sizes)


# --- count_flops ------------------------------------------------------------------------------------------------------


def test_totals_by_module_add_up() -> None:
    _, gm = traced("opt")
    count = count_flops(gm)
    layers = [cost for path, cost in count.modules.items() if path.rpartition(".")[0] == "model.decoder.layers"]
    assert len(layers) == 3
    assert sum(layer.step for layer in layers) == count.modules["model.decoder.layers"].step
    top = [cost for path, cost in count.modules.items() if "." not in path]
    assert (sum(c.forward for c in top), sum(c.backward for c in top)) == (count.forward, count.backward)
    fc1 = count.modules["model.decoder.layers.1.fc1"]
    assert (fc1.forward, fc1.backward) == (2 * 64 * 32 * 64, 2 * 2 * 64 * 32 * 64)
    assert fc1.forward_bytes == 4 * (64 * 32 + 64 * 32 + 64 + 64 * 64)
    assert step_flops(gm) == (count.forward, count.step)
    assert not count.uncounted


def test_backward_is_that_of_the_tensors_being_trained() -> None:
    _, gm = traced("opt")
    full = count_flops(gm)
    head = count_flops(gm, trained=["model.decoder.final_layer_norm.weight"])
    assert head.forward == full.forward and head.backward == full.modules["lm_head"].backward // 2
    gm.get_parameter("lm_head.weight").requires_grad_(False)
    assert count_flops(gm).backward == full.backward - full.modules["lm_head"].backward // 2


def test_the_table_shows_modules_to_a_depth() -> None:
    count = count_flops(traced("opt")[1])
    assert "lm_head" in str(count) and "fc1" not in str(count) and "fc1" in count.table(depth=5)
    assert count.table(depth=1).splitlines()[1].split()[:2] == ["model", f"{count.forward / 1e6:.3g}"]


def test_views_move_no_bytes_and_a_lookup_reads_what_it_writes() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1000, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).transpose(0, 1)[:, 1:]

    count = count_flops(trace(Lookup(), (torch.zeros(4, 3, dtype=torch.long),)))
    assert (count.forward, count.backward) == (0, 0)
    assert count.forward_bytes == 2 * 4 * 3 * 8 * 4 + 4 * 3 * 8


def test_a_normalised_weight_costs_no_product() -> None:
    """The position convolution of Wav2Vec2 and HuBERT computes its weight."""
    model = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3), dim=2)
    gm = trace(model, (torch.randn(2, 4, 9),))
    assert any("_weight_norm" in str(node.target) for node in gm.graph.nodes)
    counted = count_flops(gm)
    assert not counted.uncounted and counted.forward == 2 * 2 * 7 * 4 * 4 * 3


def test_an_operator_without_a_formula_is_listed_and_refused() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.points = nn.Parameter(torch.randn(5, 7))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.points).sum()

    gm = trace(Distances(), (torch.randn(3, 7),))
    count = count_flops(gm)
    assert len(count.uncounted) == 1 and "cdist" in count.uncounted[0] and "not counted" in str(count)
    with pytest.raises(RewriteError, match=r"no FLOPs formula for aten.cdist"):
        BackpropGraph(gm).cost({"points"})


def test_a_formula_can_be_registered() -> None:
    @torch.library.custom_op("fxsparse_test::outer_power", mutates_args=())
    def outer_power(x: Tensor) -> Tensor:
        return x @ x.T @ x

    @outer_power.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    gm = trace(Operator(outer_power, [(3, 5)]), (torch.randn(2, 3),))
    assert count_flops(gm).uncounted

    @formula("fxsparse_test::outer_power")
    def _(out: Any, x: Any) -> Any:
        from fxsparse.cost.formulas import Product

        return (Product(4 * math.prod(x.shape) * x.shape[0], {x: 0}),)

    assert not count_flops(gm).uncounted
    assert count_flops(gm).forward == 4 * 3 * 5 * 3
