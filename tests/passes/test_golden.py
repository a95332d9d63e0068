"""Rewritten graphs as text: a model, a pipeline, and the graph that is expected of it.

``FXSPARSE_UPDATE_GOLDEN=1`` writes the texts anew; read the difference. Torch and transformers decide which operators a
model is captured as, so texts are compared under the versions of ``constraints.txt`` only.
"""

from __future__ import annotations

import ast
import functools
import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from torch.fx import GraphModule

import fxsparse
from fxsparse import Pipeline
from tests.support.families import causal_lm_batch

FOLDER = Path(__file__).parent / "golden"
PIPELINES = {
    "slope": "nm-masks{pattern=2:4},double-prune,low-rank{rank=4,start=0.0}",
    "drop_layers": "drop-layers{indices=1}",
    "gates": "gates{target=0.5,score=magnitude},materialize",
    "select_neurons": "select-neurons{omission=0.5}",
    "multiplex": "multiplex{n=2}",
}
PINNED = dict(re.findall(r"^(torch|transformers)==(\S+)$", (FOLDER.parents[2] / "constraints.txt").read_text(), re.M))
IS_PINNED = all(version(package).partition("+")[0] == pinned for package, pinned in PINNED.items())


@functools.cache
def traced() -> GraphModule:
    """A Llama of two layers with grouped queries; the same weights in every run."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    return fxsparse.trace(model, kwargs=causal_lm_batch(4, 16))


def text_after(pipeline: str) -> str:
    """The graph after the last pass, under the titles of all, without their times."""
    stages = fxsparse.graphs(Pipeline(pipeline)(traced()) if pipeline else traced())
    titles = [re.sub(r", \d+ ms", "", stage.title.partition("\n")[0]) for stage in stages]
    return "\n".join([*(f"# {title}" for title in titles), "", stages[-1].code, ""])


@pytest.mark.skipif(not IS_PINNED, reason=f"operators of other versions differ from those of {PINNED}")
@pytest.mark.parametrize("name", ["traced", *PIPELINES])
def test_the_graph_is_the_expected_one(name: str) -> None:
    text = text_after(PIPELINES.get(name, ""))
    path = FOLDER / f"{name}.txt"
    if os.environ.get("FXSPARSE_UPDATE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", PIPELINES)
def test_texts_are_python_and_say_the_same_twice(name: str) -> None:
    text = text_after(PIPELINES[name])
    assert text == text_after(PIPELINES[name]) != text_after("")
    functions = [item for item in ast.parse(text).body if isinstance(item, ast.FunctionDef)]
    assert functions and functions[0].name == "forward"
