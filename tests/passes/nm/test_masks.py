"""Which weights get masks, which masks, and why the others do not."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import Record, record_of
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.passes import InsertNMMasks
from tests.support.families import FAMILIES
from tests.support.oracle import masks_of
from tests.support.traced import traced


def skips(record: Record) -> dict[str, str]:
    return {change.site: change.detail for change in record.entries[-1].skipped}


def chain(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def test_first_linears_heads_and_tied_weights_stay_dense_with_their_reason() -> None:
    expected = {
        "opt": {**{f"model.decoder.layers.0.self_attn.{part}_proj": "first" for part in "qkv"}, "lm_head": "tied"},
        "gpt2": {"transformer.h.0.attn.c_attn": "first", "lm_head": "tied"},
        "bert": {**{f"bert.encoder.layer.0.attention.self.{part}": "first" for part in ("query", "key", "value")},
                 "classifier": "head"},
        "llama": {**{f"model.layers.0.self_attn.{part}_proj": "first" for part in "qkv"}, "lm_head": "head"},
        "sequential": {"layers.0": "first", "layers.6": "head"},
    }  # fmt: skip
    for name, sites in expected.items():
        found = skips(record_of(fxsparse.rewrite(traced(name)[1], "nm-masks")))
        assert found.keys() == sites.keys(), name
        for site, word in sites.items():
            assert word in found[site], (site, found[site])


def test_a_model_without_a_head_has_none() -> None:
    import transformers

    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, use_cache=False,
    )  # fmt: skip
    model = transformers.OPTModel(config)
    gm = fxsparse.rewrite(model, "nm-masks", kwargs={"input_ids": torch.randint(2, 64, (2, 8))})
    assert all("head" not in reason for reason in skips(record_of(gm)).values())
    assert len(record_of(gm).weights) == 2 * 6 - 3


def test_defaults_can_be_turned_off() -> None:
    model = chain(8, 16, 16, 4)
    gm = fxsparse.rewrite(model, [InsertNMMasks(keep_first=False, keep_head=False)], (torch.randn(2, 8),))
    assert [weight.name for weight in record_of(gm).weights] == ["0.weight", "2.weight", "4.weight"]


def test_columns_that_do_not_divide_are_skipped_with_the_number() -> None:
    model = chain(8, 30, 32, 16, 4)
    gm = fxsparse.rewrite(model, "nm-masks{pattern=2:4}", (torch.randn(2, 8),))
    assert skips(record_of(gm))["2"] == "kept dense, 30 columns, not a multiple of 4"
    assert [weight.name for weight in record_of(gm).weights] == ["4.weight"]


def test_patterns_without_a_kernel_say_so() -> None:
    passes = [InsertNMMasks({"0": "2:16", "2": "2:8"}, keep_first=False)]
    gm = fxsparse.rewrite(chain(32, 32, 32, 4), passes, (torch.randn(2, 32),))
    details = {change.site: change.detail for change in record_of(gm).entries[0].rewritten}
    assert details["0"].endswith("no kernel multiplies by 2:16, the weight is expanded")
    assert "kernel" not in details["2"]


def test_a_shared_weight_serves_all_its_linears() -> None:
    model = chain(8, 16, 16, 16, 4)
    model[4].weight = model[2].weight
    gm = fxsparse.rewrite(model, "nm-masks", (torch.randn(2, 8),))
    (held,) = record_of(gm).weights
    assert held.names == ("2.weight", "4.weight")
    assert sum("nm_linear" in str(node.target) for node in gm.graph.nodes) == 2
    dense = copy.deepcopy(model)
    dense.load_state_dict(fxsparse.dense_state_dict(gm))
    x = torch.randn(5, 8)
    torch.testing.assert_close(gm(x), dense(x))
    assert "4.weight" not in dict(gm.named_parameters()) and "4.weight" in fxsparse.dense_state_dict(gm)


def test_a_weight_that_something_else_reads_stays_dense() -> None:
    class Regularised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain(8, 16, 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net[2].weight.square().sum()

    gm = fxsparse.rewrite(Regularised(), [InsertNMMasks(keep_first=False)], (torch.randn(2, 8),))
    assert "also read by something that is not a linear" in skips(record_of(gm))["net.2"]


def test_complex_and_double_weights() -> None:
    model = chain(8, 16, 16, 4).to(torch.complex64)
    with pytest.warns(UserWarning, match="complex64"):
        fxsparse.rewrite(model, "nm-masks", (torch.randn(2, 8, dtype=torch.complex64),))
    model = chain(8, 16, 16, 4).double()
    gm = fxsparse.rewrite(model, "nm-masks", (torch.randn(2, 8).double(),))
    assert gm.get_parameter("2.weight_values").dtype is torch.float64


def test_globs_choose_patterns_and_must_match() -> None:
    _, base = traced("opt")
    pattern = {"*.layers.0.fc*": "2:4", "*.layers.[1-2].fc*": "2:8"}
    gm = fxsparse.rewrite(base, [InsertNMMasks(pattern)])
    found = {weight.name.removeprefix("model.decoder.layers.")[:5]: weight.pattern for weight in record_of(gm).weights}
    assert found == {"0.fc1": "2:4", "0.fc2": "2:4", "1.fc1": "2:8", "1.fc2": "2:8", "2.fc1": "2:8", "2.fc2": "2:8"}
    assert (
        skips(record_of(gm))["model.decoder.layers.1.self_attn.q_proj"]
        == "kept dense, no glob of the pattern matches it"
    )
    with pytest.raises(RewriteError, match=r"'\*\.layer\.\*' matches no linear; there are: model.decoder"):
        fxsparse.rewrite(base, [InsertNMMasks({"*.layer.*": "2:4"})])
    with pytest.raises(RewriteError, match="'lm_haed' matches no linear"):
        fxsparse.rewrite(base, [InsertNMMasks(exclude="lm_haed")])


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "4:4", "2-4", "", "a:b", "2:4:8", "-1:4"])
def test_what_is_not_a_pattern(pattern: str) -> None:
    with pytest.raises(OptionError):
        InsertNMMasks(pattern)
    with pytest.raises(OptionError):
        InsertNMMasks({"*": pattern})


def test_random_masks_follow_the_seed_and_differ_between_weights() -> None:
    model = chain(8, 32, 32, 32, 4)
    masks = []
    for seed in (0, 0, 1):
        gm = fxsparse.rewrite(model, [InsertNMMasks(criterion="random", seed=seed)], (torch.randn(2, 8),))
        masks.append([masks_of(gm, weight)[0] for weight in record_of(gm).weights])
    assert torch.equal(masks[0][0], masks[1][0]) and not torch.equal(masks[0][0], masks[2][0])
    assert not torch.equal(masks[0][0], masks[0][1])
    assert (masks[0][0].unflatten(1, (-1, 4)).sum(-1) == 2).all()
    counts = torch.stack([mask.float() for pair in masks for mask in pair]).unflatten(-1, (-1, 4)).mean((0, 1, 2))
    assert (counts - 0.5).abs().max() < 0.06, "positions are not equally likely"


def test_a_random_mask_is_the_weights_in_every_dtype_and_in_one_line() -> None:
    model, x, passes = chain(8, 16, 16, 4), torch.randn(2, 8), "nm-masks{criterion=random,keep_first=false}"
    gm = fxsparse.rewrite(copy.deepcopy(model), passes, (x,))
    cast = fxsparse.rewrite(copy.deepcopy(model).half(), passes, (x.half(),))
    for mine, theirs in zip(record_of(gm).weights, record_of(cast).weights, strict=True):
        assert torch.equal(masks_of(gm, mine)[0], masks_of(cast, theirs)[0])
    options = {"passes": passes, "compiler": "eager", "fallback": False}
    compiled = torch.compile(model.eval(), backend="fxsparse", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), gm.eval()(x))
        assert not torch.allclose(compiled(x), model(x))


def test_wanda_weighs_by_the_inputs_of_the_calibration() -> None:
    model = chain(8, 16, 16, 4)
    batches = [torch.randn(6, 8) * 3, (torch.randn(2, 8),), {"input": torch.randn(1, 8)}]
    gm = fxsparse.rewrite(model, [InsertNMMasks(criterion="wanda", calibration=batches)], (torch.randn(2, 8),))
    inputs = torch.cat([batches[0], batches[1][0], batches[2]["input"]])
    norms = model[1](model[0](inputs)).norm(dim=0)
    expected = nm_mask(model[2].weight.detach().abs() * norms, Pattern(2, 4))
    (held,) = record_of(gm).weights
    assert torch.equal(masks_of(gm, held)[0], expected)
    assert not torch.equal(expected, nm_mask(model[2].weight.detach().abs(), Pattern(2, 4)))
    for calibration in (None, []):
        with pytest.raises(RewriteError, match="calibration"):
            fxsparse.rewrite(model, [InsertNMMasks(criterion="wanda", calibration=calibration)], (torch.randn(2, 8),))


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8"])
def test_transposable_masks_are_nm_both_ways(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    model = chain(8, 32, 64, 12, 4)
    gm = fxsparse.rewrite(model, [InsertNMMasks(pattern, transposable=True)], (torch.randn(2, 8),))
    held = {weight.name: weight for weight in record_of(gm).weights}
    mask, _ = masks_of(gm, held["2.weight"])
    assert (mask.unflatten(1, (-1, m)).sum(-1) == n).all()
    assert (mask.unflatten(0, (-1, m)).sum(1) == n).all()
    if m == 8:
        assert "12 rows" in skips(record_of(gm))["4"]


LISTED = ("Linear", "Conv1D", "Conv2d")


def test_every_linear_is_accounted_for() -> None:
    for name in FAMILIES:
        family, base = traced(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gm = fxsparse.rewrite(base, "nm-masks{pattern=2:4}")
        entry = record_of(gm).entries[-1]
        sites = [change.site for change in entry.changes]
        assert len(sites) == len(set(sites)), name
        modules = {path for path, module in family.model.named_modules() if type(module).__name__ in LISTED}
        assert modules == set(sites), name


@pytest.mark.parametrize("storage", ["compressed", "masked"])
def test_linears_that_feed_each_other_directly(storage: str) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    gm = fxsparse.rewrite(
        model, f"nm-masks{{storage={storage},keep_first=false,keep_head=false}}", (torch.randn(2, 8),)
    )
    assert len(record_of(gm).weights) == 4
    dense = copy.deepcopy(model)
    dense.load_state_dict(fxsparse.dense_state_dict(gm))
    x = torch.randn(5, 8)
    torch.testing.assert_close(gm(x), dense(x))
