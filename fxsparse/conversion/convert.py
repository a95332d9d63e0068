"""From a rewritten graph back to modules: `to_module`.

The result is built from a copy of the model that takes the graph's tensors instead of its own:

| step | function |
|---|---|
| a copy of the modules; a tensor that the graph no longer has stays without values | `_copied` |
| lists without the layers that were dropped, numbered anew, and their configuration | `_shorten`, `_configure` |
| numbers of features and heads follow smaller weights | ``fxsparse.conversion.resizing``, ``heads`` |
| weights in another form are held by modules of ours | ``fxsparse.conversion.weights`` |
| it is compared with the graph on random inputs | ``fxsparse.conversion.comparison`` |

Passes whose part no module can hold say so themselves (``Pass.no_module``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.conversion.comparison import difference
from fxsparse.conversion.depth import CONFIG_KEY, Shortened, parts, renumber, setting_of, shortened_lists, with_layers
from fxsparse.conversion.heads import Heads, choose_heads
from fxsparse.conversion.notes import is_pretrained, note
from fxsparse.conversion.numbers import heads_to_try
from fxsparse.conversion.resizing import resize
from fxsparse.conversion.weights import hold, weights_of
from fxsparse.conversion.width import narrower_configs
from fxsparse.errors import CheckpointError, RewriteError
from fxsparse.graph.added_state import set_aside
from fxsparse.graph.record import record_of
from fxsparse.graph.training_form import FORM_KEY
from fxsparse.graph.wrapped import unwrapped_module
from fxsparse.modules.spec import take_out
from fxsparse.ops.operator import operator_name
from fxsparse.passes.base import Pass, parse_passes
from fxsparse.passes.nm.convolutions import masked_convolutions
from fxsparse.passes.nm.sparse_linear import COMPRESSED, EXPERTS, MASKED
from fxsparse.passes.order import acting

_NUMBERS = re.compile(r"(layer|block)_?(idx|id|index|number|num)|idx")


def to_module(gm: nn.Module, model: nn.Module) -> nn.Module:
    """Turns a rewritten graph back into a module of the model's class, which computes what the graph does.

    Linears with N:M weights and with low-rank branches become modules of fxsparse in their places, with the graph's
    tensors under the graph's names (``<path>.weight_values``, ``<path>.weight_indices``, ...) and the dense weight as
    the read-only ``weight``. Dropped layers are gone and the remaining ones numbered anew; materialised structures have
    their new sizes. Everything that works on the model works on the result: ``generate()``, gradient checkpointing,
    hooks, PEFT, ``fully_shard`` layer by layer, trainers. `fxsparse.Schedule`, `explain`, `save` and
    `dense_state_dict` take it, and ``torch.compile(module, backend="fxsparse")`` lowers its operators. ::

        sparse = fxsparse.rewrite(model, "nm-masks,double-prune", kwargs=batch)
        module = fxsparse.to_module(sparse, model)
        module.generate(input_ids)

    Args:
        gm: a rewritten graph module.
        model: the model that was traced, or another instance of it, perhaps on the meta device. It gives the class
            and the structure and is left as it is.

    Returns:
        the module, in the mode of ``gm``. Its parameters and buffers are those of ``gm``, which it shares: training one
        trains the other, and an optimizer built from ``gm.parameters()`` goes on.

    Raises:
        RewriteError: a module of this class cannot hold a part of the rewrite; it names the pass and what to do. Or
            the module computes something else than the graph.
    """
    gm = fx.graph_module_of(gm, "fxsparse.to_module", whole=True)
    model = unwrapped_module(model)
    with set_aside(model):
        return _converted(gm, model)


def _converted(gm: GraphModule, model: nn.Module) -> nn.Module:
    _check_passes(gm)
    left = _left(gm)
    original = fx.tensors_of(model)
    if not set(left) & set(original):
        raise RewriteError(
            f"{type(model).__name__} has none of the graph's parameters ({next(iter(left), 'none')}, ...): pass the "
            "model that was traced, or another instance of it"
        )
    kinds = (nn.ModuleList,) if is_pretrained(model) else (nn.ModuleList, nn.Sequential)
    shortened = shortened_lists(model, _state_names(model), left, kinds)
    persistent = _state_names(model)
    narrowed = any(
        tuple(original[name].shape) != left.get(name, ()) for name in persistent if not _gone(name, shortened)
    )
    differs: str | None = "its class takes no such sizes"
    for config, heads in _candidates(gm, model, shortened, left if narrowed else None):
        try:
            module = _assembled(gm, model, shortened, left if narrowed else None, config, heads)
        except CheckpointError as error:
            differs = str(error)
            continue
        differs = difference(gm, module.eval())
        if differs is None:
            return module.train(gm.training)
    raise RewriteError(
        f"no {type(model).__name__} computes what the graph does: {differs}. Train and deploy the graph itself "
        "(fxsparse.save, torch.compile, torch.export)"
    )


def _check_passes(gm: GraphModule) -> None:
    for item in acting_passes(gm):
        if item.no_module:
            raise RewriteError(f"cannot become modules: {item.no_module}", pass_name=item.name)
    for node in gm.graph.nodes:
        name = operator_name(node.target) if node.op == "call_function" else None
        if name and node.target not in (*COMPRESSED, *MASKED, *EXPERTS):
            raise RewriteError(f"no module holds the operator {name}; keep the graph form", site=fx.stack_path(node))
    for held in masked_convolutions(gm):
        raise RewriteError(
            "no module holds a masked convolution; write its weights dense (dense_state_dict, save_pretrained), or "
            "keep the graph form",
            site=fx.module_path(held.name),
        )
    if FORM_KEY in gm.meta:
        names = ", ".join(entry.name for entry in record_of(gm).entries)
        raise RewriteError(f"the graph runs another form in training, which modules cannot (its passes: {names})")


def acting_passes(gm: GraphModule) -> list[Pass]:
    """The passes that still have a part in the graph."""
    passes = [item for entry in record_of(gm).entries for item in parse_passes(entry.text)]
    return [passes[position] for position in acting([item.name for item in passes])]


def _state_names(model: nn.Module) -> dict[str, Any]:
    return dict.fromkeys(model.state_dict(keep_vars=True))


def _left(gm: GraphModule) -> dict[str, tuple[int, ...]]:
    """The original's tensors that the graph has, in whatever form, by name: their shapes, dense."""
    tensors = fx.tensors_of(gm)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for held in record_of(gm).weights:
        if f"{held.name}_values" in tensors:
            *experts, out, _ = shapes[f"{held.name}_values"]
            matrix = (held.in_features, out) if held.transposed else (out, held.in_features)
            shapes.update(dict.fromkeys(held.names, (*experts, *matrix)))
    return shapes


# --- configurations ---------------------------------------------------------------------------------------------------


def _candidates(
    gm: GraphModule, model: Any, shortened: Shortened, narrowed: Mapping[str, tuple[int, ...]] | None
) -> Iterable[tuple[Any, Heads]]:
    """Configurations to try, the likeliest first, and the heads that attentions select; None keeps the model's own.

    Args:
        gm, model: as for `to_module`.
        shortened: the layers that were dropped.
        narrowed: the shapes of all tensors, if some are smaller than the original's.
    """
    if not is_pretrained(model) or not (narrowed or shortened):
        yield None, {}
        return
    model = copy.copy(model)
    model.config = copy.deepcopy(model.config)
    before = vars(model.config).pop(CONFIG_KEY, {"heads": {}})
    try:
        config = with_layers(model, shortened)
    except CheckpointError as error:
        raise RewriteError(str(error)) from error
    if narrowed is None:
        yield config, {}
        return
    persistent = _state_names(model)
    sizes = {
        renumber(name, shortened): torch.empty(shape, device="meta")
        for name, shape in narrowed.items()
        if name in persistent
    }
    for narrower in narrower_configs(type(model), config, sizes, gm):
        yield narrower, {}
    for heads in heads_to_try(gm, model, before["heads"], shortened):
        yield config, heads


def _gone(name: str, shortened: Shortened) -> bool:
    """Whether a tensor of the original is of a layer that was dropped."""
    for path, (numbers, _) in shortened.items():
        if name.startswith(f"{path}."):
            return int(name[len(path) + 1 :].partition(".")[0]) not in numbers
    return False


def _configure(module: nn.Module, config: Any) -> None:
    """Lets the configurations that the modules hold say what ``config`` does; they keep their identity."""
    reference: Any = module
    with torch.device("meta"):
        reference = type(module)(copy.deepcopy(config))
    done: set[int] = set()
    for path, other in reference.named_modules():
        try:
            mine = vars(module.get_submodule(path)).get("config")
        except AttributeError:
            continue
        theirs = vars(other).get("config")
        if mine is None or theirs is None or id(mine) in done:
            continue
        for part, wanted in zip(parts(mine), parts(theirs), strict=True):
            done.add(id(part))
            plain = (int, float, str, list, tuple, type(None))
            for name, setting in vars(wanted).items():
                if not name.startswith("_") and isinstance(setting, plain) and setting_of(part, name) != setting:
                    setattr(part, name, copy.deepcopy(setting))


# --- the modules ------------------------------------------------------------------------------------------------------


def _assembled(
    gm: GraphModule,
    model: nn.Module,
    shortened: Shortened,
    narrowed: Mapping[str, tuple[int, ...]] | None,
    config: Any,
    heads: Heads,
) -> nn.Module:
    module = _copied(gm, model)
    take_out(module)
    _shorten(module, shortened, _left(gm))
    if narrowed is not None:
        resize(module, {renumber(name, shortened): shape for name, shape in narrowed.items()}, heads)
    if config is not None:
        _configure(module, config)
    for weight in weights_of(gm):
        module = hold(module, gm, weight, shortened)
    _check_whole(module)
    choose_heads(module, heads)
    note(module, gm, config, heads)
    return module


def _copied(gm: GraphModule, model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the graph's tensors; in place of those that the graph no longer has, ones on meta."""
    tensors = fx.tensors_of(gm)
    # What a model keeps of its last call (RecurrentGemma) may belong to a graph of gradients, which nothing copies.
    kept = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in kept if not value.is_leaf}
    persistent = _state_names(model)
    for name, tensor in fx.tensors_of(model).items():
        twin = tensors.get(name)
        if twin is None and (id(tensor) in memo or name not in persistent):
            continue  # it stands under another of its names, or is a table that no remaining layer reads
        if twin is None:
            twin = torch.empty_like(tensor, device="meta")
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, tensor.requires_grad)
        memo[id(tensor)] = twin
    return copy.deepcopy(model, memo)


def _shorten(module: nn.Module, shortened: Shortened, left: Iterable[str]) -> None:
    """Takes the dropped layers out of their lists and numbers the others anew; in place."""
    for path, (numbers, _) in shortened.items():
        layers = module.get_submodule(path)
        before = list(layers._modules.values())
        layers._modules.clear()
        for new, old in enumerate(numbers):
            layer = before[old]
            assert layer is not None
            layers.add_module(str(new), layer)
            for part in layer.modules():
                for name, value in list(vars(part).items()):
                    if value == old and type(value) is int and _NUMBERS.fullmatch(name):
                        setattr(part, name, new)
        for name in left:
            number, _, rest = name.removeprefix(f"{path}.").partition(".")
            if name.startswith(f"{path}.") and int(number) not in numbers:
                _inherit(before[int(number)], before[numbers[0]], fx.module_path(rest))


def _inherit(dropped: nn.Module | None, layer: nn.Module | None, path: str) -> None:
    """Moves a part of a dropped layer that later layers need (T5's position bias) to the first remaining one."""
    assert dropped is not None and layer is not None
    owner, _, leaf = path.rpartition(".")
    old, new = dropped.get_submodule(owner), layer.get_submodule(owner)
    new.add_module(leaf, old.get_submodule(leaf))
    vars(new).update({name: flag for name, flag in vars(old).items() if isinstance(flag, bool) and name != "training"})


def _check_whole(module: nn.Module) -> None:
    stale = [name for name, tensor in fx.tensors_of(module).items() if tensor.is_meta]
    if stale:
        raise RewriteError(
            f"{', '.join(stale[:4])}: the graph has lost this tensor of {type(module).__name__}, so no module of its "
            "class computes the same; keep the graph form"
        )
