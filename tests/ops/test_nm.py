"""The N:M format and mask searches, against brute force."""

from __future__ import annotations

import itertools
import math
import random

import networkx as nx
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxsparse.errors import CheckpointError, OptionError, RewriteError
from fxsparse.ops import nm
from fxsparse.ops.nm import (
    Pattern,
    double_prune_mask,
    extra_zeros,
    mask_of,
    nm_mask,
    pack,
    pack_column_mask,
    satisfies,
    transposable_mask,
    unpack,
    unpack_column_mask,
    unpack_mask,
    validate,
)
from fxsparse.ops.transposable import transposable_blocks, valid_blocks

PATTERNS = ["1:2", "2:3", "1:4", "2:4", "3:4", "2:5", "2:8", "4:8", "2:16", "7:16", "5:17", "8:32", "129:256"]


def _weight(pattern: Pattern, dtype: torch.dtype = torch.float32) -> Tensor:
    """Odd numbers of rows and groups, so that rows of indices end inside a byte."""
    return torch.randn(random.choice([1, 3, 7]), pattern.m * random.choice([1, 3, 5]), dtype=dtype)


def _compressed(pattern: Pattern) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = torch.randn(3 * pattern.m, 3 * pattern.m)
    mask = nm_mask(weight.abs(), pattern)
    values, indices = pack(weight, mask, pattern)
    column_mask = pack_column_mask(double_prune_mask(weight, mask, pattern), mask, pattern)
    return weight * mask, values, indices, column_mask


# --- Pattern ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PATTERNS)
def test_pattern_reads_what_it_prints(text: str) -> None:
    assert str(Pattern.parse(text)) == text
    assert Pattern.parse(f" {text} ") == Pattern.parse(text)
    assert hash(Pattern.parse(text)) == hash(Pattern.parse(text))


@pytest.mark.parametrize("text", ["4:2", "0:4", "2-4", "2:2", "2:4:8", "2:512", "-1:4", "", "2:", "two:four", None, 24])
def test_pattern_refuses_what_means_nothing(text: str) -> None:
    with pytest.raises(OptionError, match="pattern"):
        Pattern.parse(text)


def test_pattern_suggests_the_other_way_round() -> None:
    with pytest.raises(OptionError, match="did you mean 2:4"):
        Pattern.parse("4:2")
    with pytest.raises(OptionError, match="whole number"):
        Pattern(2.0, 4)  # type: ignore[arg-type]


# --- masks ------------------------------------------------------------------------------------------------------------


def _brute_mask(row: list[float], pattern: Pattern) -> list[bool]:
    kept: list[bool] = []
    for start in range(0, len(row), pattern.m):
        group = row[start : start + pattern.m]
        order = sorted(range(pattern.m), key=lambda i: (-group[i], i))
        kept += [i in order[: pattern.n] for i in range(pattern.m)]
    return kept


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_mask_keeps_the_highest_and_of_equal_ones_the_first(text: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    scores = torch.randint(-3, 3, (5, 3 * pattern.m)).to(dtype)  # many ties
    expected = torch.tensor([_brute_mask(row, pattern) for row in scores.tolist()])
    assert torch.equal(nm_mask(scores, pattern), expected)
    assert torch.equal(nm_mask(scores.t(), pattern, dim=0), expected.t())
    assert torch.equal(nm_mask(scores[:, None, :].movedim(-1, 1), pattern, dim=1)[..., 0], expected)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 20)])
def test_mask_of_scores_that_are_not_finite_still_keeps_n(pattern: Pattern) -> None:
    scores = torch.randn(6, 3 * pattern.m)
    scores[torch.rand_like(scores) < 0.4] = float("nan")
    scores[torch.rand_like(scores) < 0.2] = float("inf")
    scores[torch.rand_like(scores) < 0.2] = -float("inf")
    mask = nm_mask(scores, pattern)
    assert (mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()
    scores = torch.tensor([[1.0, float("nan"), 3.0, 2.0]])
    assert nm_mask(scores, Pattern(1, 4)).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_masks_and_packing_run_on_shapes_alone(device: str) -> None:
    pattern = Pattern(2, 8)
    with FakeTensorMode():
        weight = torch.empty(16, 24, device="meta" if device == "meta" else "cpu")
        mask = nm_mask(weight.abs(), pattern)
        values, indices = pack(weight, mask, pattern)
        assert values.shape == (16, 6) and indices.shape == (16, 3) and indices.dtype == torch.uint8
        assert mask_of(weight, pattern).shape == transposable_mask(weight, pattern).shape == (16, 24)
        columns = pack_column_mask(double_prune_mask(weight, mask, pattern), mask, pattern)
        assert columns.shape == (16, 1)
        validate(values, indices, pattern, 24, columns)
        assert unpack(values, indices, pattern, 24).shape == unpack_column_mask(columns, mask, pattern).shape


@pytest.mark.parametrize("text", ["1:2", "2:4", "2:3", "2:8", "3:20"])
def test_second_pruning_keeps_the_largest_of_what_the_first_kept(text: str) -> None:
    pattern, rows = Pattern.parse(text), Pattern.parse("2:4")
    weight = torch.randint(-4, 5, (3 * pattern.m, 20)).float()  # ties, and kept zeros
    mask = nm_mask(weight.abs(), rows)
    column_mask = double_prune_mask(weight, mask, pattern)
    assert not (column_mask & ~mask).any()
    scores = torch.where(mask, weight.abs(), -1)
    expected = torch.tensor([_brute_mask(column, pattern) for column in scores.t().tolist()]).t() & mask
    assert torch.equal(column_mask, expected)


@pytest.mark.parametrize(
    ("text", "percent"), [("1:2", 12.5), ("2:4", 9.375), ("2:8", 5.84), ("4:8", 6.836), ("1:4", 7.91)]
)
def test_extra_zeros_follow_lemma_2_1(text: str, percent: float) -> None:
    pattern = Pattern.parse(text)
    assert 100 * extra_zeros(pattern) == pytest.approx(percent, abs=0.005)
    weight = torch.randn(2048, 2048)
    mask = nm_mask(weight.abs(), pattern)
    extra = mask.float().mean() - double_prune_mask(weight, mask, pattern).float().mean()
    assert 100 * extra.item() == pytest.approx(percent, abs=0.2)


# --- transposable masks -----------------------------------------------------------------------------------------------


def _check_both_ways(mask: Tensor, pattern: Pattern) -> None:
    assert (mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()
    assert (mask.unflatten(0, (-1, pattern.m)).sum(1) == pattern.n).all()


def test_there_are_ninety_blocks_of_2_4() -> None:
    assert [len(valid_blocks(n, m)) for n, m in [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)]] == [
        2,
        6,
        6,
        24,
        90,
        24,
    ]


@pytest.mark.parametrize("text", ["1:2", "1:3", "2:3", "1:4", "2:4", "3:4", "2:5", "2:8", "4:8", "7:8", "8:16"])
def test_transposable_mask_is_nm_both_ways(text: str) -> None:
    pattern = Pattern.parse(text)
    for scores in (
        torch.randn(3 * pattern.m, 5 * pattern.m),
        torch.randint(0, 2, (2 * pattern.m, pattern.m)),
        torch.zeros(pattern.m, pattern.m, dtype=torch.bfloat16),
        torch.full((pattern.m, 2 * pattern.m), float("nan")),
        torch.randn(pattern.m, pattern.m) / 0,
        torch.randn(pattern.m, 2 * pattern.m).t().repeat(1, 2),
    ):
        _check_both_ways(transposable_mask(scores, pattern), pattern)
    assert transposable_mask(torch.randn(0, pattern.m), pattern).shape == (0, pattern.m)


@pytest.mark.parametrize("text", ["1:2", "2:3", "2:4", "1:4"])
def test_transposable_mask_of_small_blocks_is_the_best(text: str) -> None:
    pattern = Pattern.parse(text)
    scores = torch.rand(2 * pattern.m, 3 * pattern.m, dtype=torch.float64)
    mask = transposable_mask(scores, pattern)
    for i, j in itertools.product(range(2), range(3)):
        at = (slice(i * pattern.m, (i + 1) * pattern.m), slice(j * pattern.m, (j + 1) * pattern.m))
        best = max((scores[at] * torch.tensor(block)).sum() for block in valid_blocks(pattern.n, pattern.m))
        torch.testing.assert_close((scores[at] * mask[at]).sum(), best)


@pytest.mark.parametrize("text", ["2:5", "2:8", "4:8", "6:12"])
def test_transposable_mask_of_large_blocks_is_near_the_best(text: str) -> None:
    pattern = Pattern.parse(text)
    scores = torch.rand(8, pattern.m, pattern.m, dtype=torch.float64)
    totals = (scores * transposable_blocks(scores, pattern.n)).sum((1, 2))
    best = torch.tensor([_best_total(block, pattern) for block in scores], dtype=torch.float64)
    assert (totals <= best + 1e-4).all()
    assert (totals / best).mean() > 0.99
    circulant = torch.stack([torch.arange(pattern.m).roll(i) < pattern.n for i in range(pattern.m)])
    assert (totals > (scores * circulant).sum((1, 2))).all()


def _best_total(scores: Tensor, pattern: Pattern) -> float:
    """By minimum-cost flow: n units leave each row, n enter each column, one may pass from a row to a column."""
    graph, scale = nx.DiGraph(), 10**7
    for i, j in itertools.product(range(pattern.m), repeat=2):
        graph.add_edge("source", f"row{i}", capacity=pattern.n, weight=0)
        graph.add_edge(f"column{j}", "sink", capacity=pattern.n, weight=0)
        graph.add_edge(f"row{i}", f"column{j}", capacity=1, weight=-round(scale * scores[i, j].item()))
    flow = nx.max_flow_min_cost(graph, "source", "sink")
    return -nx.cost_of_flow(graph, flow) / scale


# --- the compressed form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_packing_round_trips(text: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    weight = _weight(pattern, dtype)
    mask = nm_mask(torch.rand_like(weight), pattern)
    values, indices = pack(weight, mask, pattern)
    assert values.dtype == dtype and values.shape == (weight.shape[0], pattern.kept(weight.shape[1]))
    assert torch.equal(values.flatten(), weight[mask])
    assert indices.shape == (weight.shape[0], pattern.index_bytes(weight.shape[1]))
    assert torch.equal(unpack(values, indices, pattern, weight.shape[1]), weight.where(mask, 0))
    assert torch.equal(unpack_mask(indices, pattern, weight.shape[1]), mask)
    assert torch.equal(nm.gather_kept(weight, indices, pattern), values)
    validate(values, indices, pattern, weight.shape[1])


@pytest.mark.parametrize("text", PATTERNS)
def test_column_mask_round_trips(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = _weight(pattern)
    mask = nm_mask(weight.abs(), pattern)
    column_mask = mask & (torch.rand_like(weight) < 0.7)
    packed = pack_column_mask(column_mask, mask, pattern)
    assert torch.equal(unpack_column_mask(packed, mask, pattern), column_mask)
    outside = column_mask | ~mask & (torch.rand_like(weight) < 0.5)
    assert torch.equal(pack_column_mask(outside, mask, pattern), packed)
    bits = "".join(f"{byte:08b}"[::-1] for byte in packed[0].tolist())
    assert [bit == "1" for bit in bits[: pattern.kept(weight.shape[1])]] == column_mask[0][mask[0]].tolist()


def test_bytes_of_2_4_hold_two_nibbles_of_tensor_cores() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1]], dtype=torch.bool)
    _, indices = pack(torch.randn(1, 12), mask, Pattern(2, 4))
    assert indices.tolist() == [[0 | 3 << 2 | 1 << 4 | 2 << 6, 2 | 3 << 2]]  # the last half byte is padding


def test_indices_equal_those_torch_converts_for_tensor_cores() -> None:
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    pattern = Pattern(2, 4)
    weight = torch.randn(32, 64, dtype=torch.float16)
    mask = nm_mask(weight.abs(), pattern)
    values, indices = pack(weight, mask, pattern)
    kept, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight * mask)
    assert torch.equal(values, kept)
    words = torch.empty_like(meta).flatten()
    offsets = conversions._calculate_meta_reordering_scatter_offsets(32, meta.shape[1], meta.dtype, "cpu")
    words = torch.gather(meta.flatten(), 0, offsets).view(32, -1)
    assert torch.equal(indices.view(torch.int16), words)


def test_kept_zeros_and_their_signs_survive() -> None:
    weight = torch.tensor([[0.0, -0.0, 5.0, 0.0, 1.0, 0.0, 0.0, 2.0]])
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    values, indices = pack(weight, mask, Pattern(2, 4))
    assert values.tolist() == [[0, 0, 0, 2]] and values.signbit().tolist() == [[False, True, False, False]]
    assert unpack(values, indices, Pattern(2, 4), 8).signbit()[0, 1]
    assert torch.equal(unpack_mask(indices, Pattern(2, 4), 8), mask)


@pytest.mark.parametrize("text", PATTERNS)
def test_unpacking_is_pointwise_where_it_is_traced(text: str) -> None:
    """Bit for bit, signs of zeros and what is not finite too."""
    pattern = Pattern.parse(text)
    weight = _weight(pattern, torch.float32)
    odd = torch.tensor([-0.0, math.inf, math.nan])[: weight.numel()]
    weight.view(-1)[: len(odd)] = odd
    parts = pack(weight, nm_mask(torch.rand_like(weight), pattern), pattern)
    size = weight.shape[1]
    traced = make_fx(lambda values, indices: unpack(values, indices, pattern, size), tracing_mode="fake")(*parts)
    assert torch.equal(traced(*parts).view(torch.int32), unpack(*parts, pattern, size).view(torch.int32))
    assert ("scatter" in traced.code) == (pattern.n > 4)


def test_unpacking_passes_gradients_to_values() -> None:
    values = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    pattern = Pattern(2, 4)
    _, indices = pack(torch.randn(3, 12), nm_mask(torch.rand(3, 12), pattern), pattern)
    assert torch.autograd.gradcheck(lambda v: unpack(v, indices, pattern, 12), (values,))


@pytest.mark.parametrize("text", ["1:2", "2:4", "2:8", "3:20"])
def test_weights_that_satisfy_a_pattern_have_a_mask(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(5, 4 * pattern.m)
    pruned = weight * nm_mask(weight.abs(), pattern) * (torch.rand_like(weight) < 0.6)
    assert satisfies(pruned, pattern)
    mask = mask_of(pruned, pattern)
    assert (mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()
    assert torch.equal(unpack(*pack(pruned, mask, pattern), pattern, pruned.shape[1]), pruned)
    assert not satisfies(weight, pattern)
    assert not satisfies(torch.zeros(3, pattern.m + 1), pattern)
    with pytest.raises(RewriteError, match=f"not {pattern}"):
        mask_of(weight, pattern)


def test_a_nan_counts_as_a_weight() -> None:
    assert not satisfies(torch.tensor([[float("nan"), 1.0, 2.0, 0.0]]), Pattern(2, 4))


def test_wrong_shapes_and_masks_are_refused() -> None:
    pattern = Pattern(2, 4)
    weight = torch.randn(4, 8)
    mask = nm_mask(weight.abs(), pattern)
    with pytest.raises(RewriteError, match="not a multiple of 4"):
        nm_mask(torch.randn(4, 10), pattern)
    with pytest.raises(RewriteError, match="not a multiple of 4"):
        double_prune_mask(weight[:3], mask[:3], pattern)
    with pytest.raises(RewriteError, match="not a multiple of 4"):
        transposable_mask(weight[:3], pattern)
    with pytest.raises(RewriteError, match=r"\[out, in\]"):
        transposable_mask(weight[0], pattern)
    with pytest.raises(RewriteError, match="exactly 2"):
        pack(weight, torch.ones_like(mask), pattern)
    with pytest.raises(RewriteError, match="shaped as its weight"):
        pack(weight, mask[:3], pattern)
    with pytest.raises(RewriteError, match="mask is bool"):
        pack(weight, mask.float(), pattern)
    with pytest.raises(RewriteError, match="matrix"):
        pack(weight[0], mask[0], pattern)


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1:2", "2:4", "3:5", "2:8", "5:17"])
def test_what_is_packed_is_valid_and_damage_is_found(text: str) -> None:
    pattern = Pattern.parse(text)
    dense, values, indices, column_mask = _compressed(pattern)
    in_features = dense.shape[1]

    def check(match: str, *args: Tensor, features: int = in_features) -> None:
        with pytest.raises(CheckpointError, match=match):
            validate(*args[:2], pattern, features, *args[2:], name="fc1.weight")

    validate(values, indices, pattern, in_features, column_mask, name="fc1.weight")
    check("fc1.weight_values is", values[:, :-1], indices)
    check("fc1.weight_values is torch.int64", values.long(), indices)
    check("fc1.weight_indices is", values, indices[:-1])
    check("expected torch.uint8", values, indices.to(torch.int8))
    check("fc1.weight_column_mask is", values, indices, column_mask[:, :0])
    check("not a multiple", values, indices, features=in_features + 1)
    check("fc1.weight_values is", values.flatten(), indices)


def test_indices_out_of_range_out_of_order_or_with_padding_are_found() -> None:
    pattern = Pattern(2, 3)
    _, values, indices, column_mask = _compressed(pattern)  # 9 rows of 6 values: 12 bits of indices, 6 of columns
    valid = indices.clone()
    for at, byte, match in [
        ((4, 0), 0b11_01_01_00, "not below m = 3, first in row 4"),
        ((7, 0), 0b10_01_00_01, "do not ascend, first in row 7"),
        ((7, 0), 0b10_01_01_01, "do not ascend, first in row 7"),
        ((2, 1), 0b0001_01_00, "padding bits that are not zero, first in row 2"),
    ]:
        indices = valid.clone()
        indices[at] = byte
        with pytest.raises(CheckpointError, match=match):
            validate(values, indices, pattern, 9)
    column_mask[3, 0] |= 1 << 6
    with pytest.raises(CheckpointError, match="weight_column_mask has padding bits"):
        validate(values, valid, pattern, 9, column_mask)
