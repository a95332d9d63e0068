"""Folders of families whose configuration or class has ways of its own: what was written is what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.fx import GraphModule

import fxsparse
from benchmarks.families.tiny import Family, build, floats
from fxsparse.errors import CheckpointError
from fxsparse.passes.structured import hard_concrete

GATES = "gates{score=random,target=0.0}"
"""Gates of every kind, all open."""


def rewritten(name: str, passes: str, **masks: Tensor) -> tuple[Family, GraphModule]:
    """A tiny model and its graph after passes; then gates whose names end so are set, and materialized."""
    family = build(name)
    gm = fxsparse.rewrite(fxsparse.trace(family.model, kwargs=family.batch()), passes)
    for ending, mask in masks.items():
        gates = [name for name in hard_concrete.gate_names(gm) if name.endswith(ending)]
        assert gates, hard_concrete.gate_names(gm)
        for gate in gates:
            gm.get_buffer(hard_concrete.mask_name(gate)).copy_(mask)
    return family, fxsparse.rewrite(gm, "materialize").eval() if masks else gm.eval()


def assert_read_as_written(family: Family, gm: GraphModule, folder: Path, *, plain: bool) -> None:
    fxsparse.save_pretrained(gm, family.model, folder)
    read: list[Any] = [fxsparse.from_pretrained(folder)]
    assert (folder / "model.safetensors").is_file() == plain
    if plain:
        read.append(type(family.model).from_pretrained(folder).eval())
    batch = family.batch(1, 5)
    for model in read:
        for mine, theirs in zip(floats(model(**batch)), floats(gm(**batch)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "beit"])
@pytest.mark.parametrize("dropped", [0, 1])
def test_stages_are_named_anew(name: str, dropped: int, tmp_path: Path) -> None:
    """The configuration of a backbone names its layers, and those that it gives out."""
    family, gm = rewritten(name, f"drop-layers{{indices=[{dropped}]}}")
    assert_read_as_written(family, gm, tmp_path, plain=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.stage_names == ["stem", "stage1"] and config.out_features == ["stage1"]


def test_positions_that_a_class_would_make_anew_are_those_of_the_graph(tmp_path: Path) -> None:
    """Marian leaves its sinusoids out of a file and computes them when it is read."""
    family = build("marian")
    with torch.no_grad():
        family.model.model.encoder.embed_positions.weight.mul_(2)
    gm = fxsparse.trace(family.model, kwargs=family.batch()).eval()
    assert_read_as_written(family, gm, tmp_path, plain=True)


@pytest.mark.parametrize("as_module", [False, True])
def test_what_is_read_back_otherwise_is_refused(
    as_module: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, gm = rewritten("llama", "nm-masks")
    read = transformers.LlamaForCausalLM.from_pretrained.__func__

    def otherwise(cls: Any, *args: Any, **options: Any) -> Any:
        model, loading = read(cls, *args, **options)
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        return model, loading

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", classmethod(otherwise))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM reads .*model\.norm\.weight"):
        if as_module:
            fxsparse.save_pretrained(fxsparse.to_module(gm, family.model), tmp_path)
        else:
            fxsparse.save_pretrained(gm, family.model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_module_of_a_class_that_initialises_what_it_reads(tmp_path: Path) -> None:
    """DINOv2's class writes to every linear's weight before it reads a file."""
    family, gm = rewritten("dinov2", "nm-masks")
    fxsparse.save_pretrained(fxsparse.to_module(gm, family.model), tmp_path)
    batch = family.batch(1, 5)
    torch.testing.assert_close(
        fxsparse.from_pretrained(tmp_path)(**batch).logits, gm(**batch).logits, rtol=1e-5, atol=1e-5
    )


def test_one_projection_of_grouped_queries(tmp_path: Path) -> None:
    """GPTBigCode's c_attn is a linear of all queries and one key and value head."""
    mask = torch.tensor([1.0, 0, 1, 1])
    family, gm = rewritten("gpt_bigcode", GATES, heads_gate=mask, intermediate_gate=(torch.arange(128) < 48).float())
    assert_read_as_written(family, gm, tmp_path, plain=False)


def test_one_key_head_beside_all_queries(tmp_path: Path) -> None:
    """Falcon's query_key_value; its module divides it by its number of heads."""
    family, gm = rewritten("falcon", GATES, heads_gate=torch.tensor([1.0, 0, 1, 1]))
    assert_read_as_written(family, gm, tmp_path, plain=False)


def test_lists_as_long_as_there_are_layers_by_chance(tmp_path: Path) -> None:
    """Mamba 2 limits its time step from both sides, by a list of two, and has two layers here."""
    family, gm = rewritten("mamba2", "drop-layers{indices=[0]}")
    assert_read_as_written(family, gm, tmp_path, plain=True)
    assert len(transformers.AutoConfig.from_pretrained(tmp_path).time_step_limit) == 2


@pytest.mark.parametrize("name", ["speech_to_text", "bamba", "layoutlm"])
def test_other_lists_and_inputs_of_their_own(name: str, tmp_path: Path) -> None:
    """As many convolutions as layers; limits of a time step; boxes that random numbers are not."""
    family, gm = rewritten(name, "drop-layers{indices=[1]}")
    assert_read_as_written(family, gm, tmp_path, plain=True)


def test_layers_in_stages(tmp_path: Path) -> None:
    family, gm = rewritten("segformer", "drop-layers{indices=[1]}")
    assert_read_as_written(family, gm, tmp_path, plain=False)


def test_a_scale_of_what_is_gone(tmp_path: Path) -> None:
    """BEiT multiplies each sublayer by a bare parameter of the layer."""
    family, gm = rewritten(
        "beit", GATES, **{"1.mlp.ffn_gate": torch.zeros(1), "0.attention.attention_gate": torch.zeros(1)}
    )
    assert_read_as_written(family, gm, tmp_path, plain=False)


@pytest.mark.parametrize("dropped", [0, 1])
def test_layers_of_experts(dropped: int, tmp_path: Path) -> None:
    family, gm = rewritten("mixtral", f"drop-layers{{indices=[{dropped}]}}")
    assert_read_as_written(family, gm, tmp_path, plain=True)
