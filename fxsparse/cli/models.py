"""A model and an example of its inputs: from a folder of Hugging Face, a configuration, or a function of the user's.

folder            the weights in it, whether transformers or fxsparse wrote it; without weights, its configuration
config.json       a model of that configuration without weights: on the meta device, or made anew at random
module:function   what the function returns: a model and its inputs, a mapping, a tuple or a tensor
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse.cli.output import working
from fxsparse.errors import CheckpointError, FxsparseError, OptionError
from fxsparse.integrations.huggingface import from_pretrained
from fxsparse.passes import Pipeline
from fxsparse.tracing.trace import trace

_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Loaded:
    """A model and an example of its inputs.

    Attributes:
        model: the model, in evaluation mode.
        args, kwargs: the example.
        folder: it came from, if it did.
        weightless: whether its weights are not those of a checkpoint: on the meta device, or random.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    weightless: bool = False

    def traced(self) -> GraphModule:
        """The model's graph."""
        with working(f"tracing {type(self.model).__name__}"):
            return trace(self.model, self.args, self.kwargs)

    def rewritten(self, gm: GraphModule, passes: Pipeline, *, keep_graphs: bool = False) -> GraphModule:
        """The graph after the passes; without weights, of the right structure only."""
        count = len(passes.passes)
        with working("rewriting", count) as advance:
            pipeline = Pipeline(
                passes.passes, callback=lambda item, before, after: advance(item.name), keep_graphs=keep_graphs
            )
            return pipeline(gm, structure_only=self.weightless and _is_meta(gm))


def _is_meta(gm: GraphModule) -> bool:
    return any(parameter.is_meta for parameter in gm.parameters())


def read_model(text: str, *, batch: int, tokens: int, seed: int, values: bool = True) -> Loaded:
    """The model that ``text`` names.

    Args:
        text: MODEL of the command line.
        batch, tokens: sizes of the example.
        seed: of the example, and of weights that are made anew.
        values: whether the values of weights matter; otherwise a configuration is read without making any.

    Raises:
        CheckpointError: there is no such model, or it cannot be read.
        OptionError: no example of its inputs can be made.
    """
    torch.manual_seed(seed)
    path = Path(text)
    module, colon, function = text.rpartition(":")
    if colon and not path.exists():
        return _called(module, function)
    if not path.exists():
        raise CheckpointError(
            f"there is no {text}: MODEL is a folder with a config.json, a config.json, or module:function"
        )
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists() or (path.is_file() and path.name != "config.json"):
        raise CheckpointError(f"{text} is neither a folder with a config.json nor a config.json")
    if not has_transformers():
        raise CheckpointError(
            "reading a folder of Hugging Face needs transformers: pip install 'fxsparse[transformers]'"
        )
    with working(f"reading {text}"):
        has_weights = path.is_dir() and any(file for glob in _WEIGHTS for file in path.glob(glob))
        model = _guarded(folder, _with_weights if has_weights else lambda folder: _without(folder, values))
    inputs = example(model, batch, tokens)
    if not values and not has_weights:
        inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    return Loaded(model, (), inputs, path if path.is_dir() else None, not has_weights)


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _guarded(folder: Path, read: Callable[[Path], nn.Module]) -> nn.Module:
    """What ``read`` returns; whatever else it raises names the folder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return read(folder).eval()
    except (FxsparseError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def _with_weights(folder: Path) -> nn.Module:
    return from_pretrained(folder)


def _without(folder: Path, values: bool) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = next(iter(config.architectures or ()), None)
    cls = getattr(transformers, str(name), None)
    if cls is None:
        raise CheckpointError(f"{folder}/config.json names no class of transformers under architectures, but {name}")
    with torch.device("cpu" if values else "meta"):
        model: nn.Module = cls(config)
    return model


def _called(module: str, function: str) -> Loaded:
    sys.path.insert(0, os.getcwd())
    name = f"{module}:{function}"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(f"{name} cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    make = getattr(found, function, None)
    if not callable(make):
        raise CheckpointError(f"{module} has no function {function}")
    try:
        result = make()
    except Exception as error:
        raise CheckpointError(f"{name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module):
        raise OptionError(
            f"{name} must return a model and an example of its inputs, a mapping, a tuple or a tensor; it returned "
            f"{type(result).__name__}"
        )
    model, inputs = result
    if isinstance(inputs, Mapping):
        return Loaded(model, (), dict(inputs))
    return Loaded(model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))


# --- an example for a model of transformers ---------------------------------------------------------------------------


def example(model: Any, batch: int, tokens: int) -> dict[str, Tensor]:
    """Random inputs of a model of transformers, with labels where it takes some.

    Raises:
        OptionError: what the model takes is not known.
    """
    config, takes = model.config, set(inspect.signature(model.forward).parameters)
    text = config.get_text_config()
    inputs: dict[str, Tensor] = {}
    if model.main_input_name == "input_features":
        bins, frames = config.num_mel_bins, 2 * config.max_source_positions
        inputs["input_features"] = torch.randn(batch, bins, frames)
    if "pixel_values" in takes:
        inputs["pixel_values"] = _image(config, batch)
    if "input_ids" in takes:
        tokens = min(tokens, getattr(text, "max_position_embeddings", None) or tokens)
        inputs["input_ids"] = _tokens(text, batch, tokens)
    if not inputs:
        raise OptionError(
            f"what {type(model).__name__} takes is not known; give MODEL as module:function, a function that returns "
            "the model and an example of its inputs"
        )
    if "labels" in takes:
        inputs["labels"] = _labels(model, batch, inputs.get("input_ids"), tokens)
    elif "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _tokens(text, batch, tokens)
    return inputs


def _tokens(config: Any, batch: int, tokens: int) -> Tensor:
    """Tokens that are none of the special ones, which stand at the beginning or the end of most vocabularies."""
    edge = 3 if config.vocab_size > 16 else 0
    return torch.randint(edge, config.vocab_size - edge, (batch, tokens))


def _image(config: Any, batch: int) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(batch, getattr(vision, "num_channels", 3), height, width)


def _labels(model: Any, batch: int, input_ids: Tensor | None, tokens: int) -> Tensor:
    kind, count = type(model).__name__, model.config.num_labels
    if kind.endswith(("SequenceClassification", "ImageClassification")):
        return torch.randint(count, (batch,))
    if kind.endswith("TokenClassification"):
        return torch.randint(count, (batch, tokens))
    return _tokens(model.config.get_text_config(), batch, tokens) if input_ids is None else input_ids.clone()
