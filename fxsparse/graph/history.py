"""The text of a graph after each pass, kept on request in ``gm.meta``, apart from the record.

A graph cannot be made again from the record without the original model, and a copy of it for every pass costs more than
a pass that does little. Its text, compressed, is ten bytes a node; making it takes 0.02 ms a node, so it is asked for.
"""

from __future__ import annotations

import zlib

from torch.fx import GraphModule

from fxsparse.graph.readable import readable
from fxsparse.graph.record import record_of
from fxsparse.graph.training_form import FORM_KEY

HISTORY_KEY = "fxsparse_graphs"


def text_of(gm: GraphModule) -> str:
    """The graph of ``gm`` as Python, and what it runs in training where that is another graph."""
    form = gm.meta.get(FORM_KEY)
    texts = [readable(gm.graph), *([readable(form.graph, "forward_in_training")] if form is not None else [])]
    return "\n\n\n".join(texts)


def keep(gm: GraphModule) -> None:
    """Keeps the text of the graph as it is now, under the number of passes that ran on it."""
    passes = len(record_of(gm).entries)
    gm.meta[HISTORY_KEY] = {**gm.meta.get(HISTORY_KEY, {}), passes: zlib.compress(text_of(gm).encode())}


def kept(gm: GraphModule) -> dict[int, str]:
    """The texts that were kept, by the number of passes that ran before."""
    return {passes: zlib.decompress(text).decode() for passes, text in gm.meta.get(HISTORY_KEY, {}).items()}
