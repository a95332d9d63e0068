"""Tiny models of any family of transformers, by general rules.

A configuration is made small by the names of its settings (`RULES`), in every configuration inside it too; lists that
have an entry for each layer are cut. Inputs follow from the signature of the model's forward, labels from what gives a
loss. What the rules give must build and run, else the next of `PROFILES` is tried: nothing here knows a family by name.
"""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

VOCABULARY, TOKENS, HIDDEN, WIDE, HEADS, LAYERS, IMAGE, MEL = 128, 12, 32, 64, 4, 2, 32, 16
MOST_PARAMETERS = 4_000_000

RULES: tuple[tuple[str, int], ...] = (
    (r"\w*vocab_size\w*", VOCABULARY),
    (r"num_feat_extract_layers", 99),  # follows from other lists
    (r"mamba_d_head|mamba_head_dim", HIDDEN * 2 // HEADS),
    (r"mamba_d_ssm", HIDDEN * 2),
    (r"(\w+_)?(num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num)", 2),
    (r"(mamba|linear|ssm)_(n|num)_(key_|value_)?heads", HEADS),
    (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|head_count)", HEADS),
    (r"(\w+_)?(head_dim|d_kv|d_head|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|dim_head)", HIDDEN // HEADS),
    (r"rotary_dim", 4),
    (r"(\w+_)?(kv_lora_rank|q_lora_rank|lora_rank)", 16),
    (r"(\w*moe_intermediate_size|expert_intermediate_size|shared_\w*intermediate_size)", WIDE // 2),
    (
        r"\w*(intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|intermediate_dim|inner_dim|d_inner)\w*",
        WIDE,
    ),
    (r"(\w+_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_dim|embedding_size|dim|emb_dim)", HIDDEN),
    (
        r"\w*projection_dim|word_embed_proj_dim|output_dim|out_hidden_size|classifier_proj_size|proj_codevector_dim",
        HIDDEN,
    ),
    (r"intra_bottleneck_size|codevector_dim|rank|conv_dim|hidden_size_per_layer_input|pooler_output_size", HIDDEN),
    (r"(\w+_)?(num_hidden_layers|n_layers?|num_layers|layers|num_decoder_layers|num_encoder_layers|depth)", LAYERS),
    (
        r"\w*max_position_embeddings|n_positions|max_source_positions|max_target_positions|context_length|n_ctx|seq_length",
        64,
    ),
    (r"(\w+_)?image_size|pretrain_image_size|img_size", IMAGE),
    (r"num_mel_bins|mel_dim|input_feat_per_channel", MEL),
    (r"(\w+_)?(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|experts_per_token|num_selected_experts", 2),
    (r"n_group|topk_group|n_groups|mamba_n_groups|num_expert_group", 1),
    (r"state_size|\w*d_state|ssm_state_size", 8),
    (r"sliding_window|local_attention|attention_window|window", 8),
    (r"window_size", 4),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
    (r"num_queries|num_frames", 4),
    (r"chunk_size", 8),
)
"""Settings by their names, and what they become."""

OFF = re.compile(r"\w*(dropout|layerdrop|layer_drop|drop_rate|pdrop|drop_prob|jitter)\w*|mask_\w+_prob|resid_drop\w*")
"""Settings of what training draws at random, so that a step can be compared."""
DROP_PATH, DEPTH_DROPPED = re.compile(r"\w*drop_path\w*"), 0.2
"""Stochastic depth draws in a module of its own, in graph and model alike, and stays."""

_UNSET = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 0}
"""Settings that a configuration may leave to its checkpoints."""
_GIVEN = "every setting that is None"

PROFILES: tuple[dict[str, Any], ...] = (
    {},
    {_GIVEN: True},
    {r"(\w+_)?num_key_value_heads": HEADS},
    {r"(\w+_)?(hidden_size|d_model|embed_dim)": 48, r"(\w+_)?head_dim": 12},
    {r"(\w+_)?head_dim": 16},
    {r"(\w+_)?(num_attention_heads|num_heads)": 8},
    {r"patch_size": 4},
    {r"(\w+_)?image_size": 64},
    {r"num_queries|(\w+_)?(head_dim|qk_rope_head_dim)": 32},
    {r"(\w+_)?(num_hidden_layers|num_layers)": 4},
)
"""Further settings, tried in turn where a model does not build or run without them."""

HEADS_FIRST = (
    "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM", "IMAGE_CLASSIFICATION", "CTC",
    "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "MASKED_IMAGE_MODELING",
    "QUESTION_ANSWERING", "TOKEN_CLASSIFICATION", "PRETRAINING", "TEXT_ENCODING", "IMAGE", "BACKBONE",
)  # fmt: skip
"""Tasks, as transformers' tables of classes name them; a family is built for the first that it has."""


class NotTiny(Exception):
    """The rules give no model of this family that builds, is small and runs."""


@dataclass(frozen=True)
class Family:
    """A tiny model in training mode, in which nothing is random but stochastic depth, and its batches.

    Attributes:
        name: transformers' ``model_type``.
        model: seeded; norms and biases are not ones and zeros.
        recipe: makes inputs of a batch size.
        labels: of which kind: ``tokens``, ``class`` or ``none``.
    """

    name: str
    model: Any
    recipe: Callable[[int], dict[str, Any]]
    labels: str

    def batch(self, seed: int = 0, size: int = 3) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.recipe(size)

    def loss(self, output: Any) -> Tensor:
        """The model's own, or the mean square of all that it returns."""
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if isinstance(loss, Tensor) and loss.requires_grad:
            return loss
        return mean_squares(tensor for tensor in floats(output) if tensor.requires_grad)


def mean_squares(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the mean square of each."""
    return torch.stack([tensor.square().mean() for tensor in tensors]).sum()


def floats(output: Any) -> list[Tensor]:
    """The tensors of floating point in an output."""
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


# --- which ------------------------------------------------------------------------------------------------------------


def classes() -> dict[str, list[str]]:
    """The names of the model classes of every family, that of the first task first."""
    found: dict[str, list[str]] = {}
    for task in HEADS_FIRST:
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        for name, architecture in table.items():
            names = [architecture] if isinstance(architecture, str) else list(architecture)
            found.setdefault(name, []).extend(names)
    known = configuration_auto.CONFIG_MAPPING_NAMES
    return {name: list(dict.fromkeys(found[name])) for name in sorted(found) if name in known}


# --- configurations ---------------------------------------------------------------------------------------------------


def configuration(name: str, profile: Mapping[str, Any]) -> Any:
    """The small configuration of a family."""
    default = AutoConfig.for_model(name)
    ids = itertools.count(VOCABULARY - 1, -1)
    return type(default)(**_settings(default, profile, ids, {}))


def _settings(default: Any, profile: Mapping[str, Any], ids: Iterator[int], known: dict[str, int]) -> dict[str, Any]:
    """What differs from a default configuration."""
    settings: dict[str, Any] = {}
    every = {name: item for name, item in vars(default).items() if not name.startswith("_")}
    before = next(
        (every[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(every.get(n), int)), 0
    )
    depth = _depth(every, before, profile)
    for name, item in every.items():
        if isinstance(item, PreTrainedConfig):
            settings[name] = {"model_type": item.model_type, **_settings(item, profile, ids, known)}
        elif isinstance(item, (list, tuple)) and item and len(item) == before:
            shorter = type(item)(_cut(list(item), depth))
            small = _small(name, shorter, profile, ids, known)
            settings[name] = shorter if small is None else small
        else:
            small = _small(name, item, profile, ids, known)
            if small is not None:
                settings[name] = small
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in settings and before:
            settings[name] = depth
    if every.get("num_key_value_heads", 0) == every.get("num_attention_heads") and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if every.get("is_encoder_decoder"):
        settings = {"decoder_start_token_id": 0, "pad_token_id": 0, **settings}
    return settings


def _depth(every: Mapping[str, Any], before: int, profile: Mapping[str, Any]) -> int:
    """As many layers as there are kinds of them, but two at least."""
    wanted = next((value for pattern, value in profile.items() if re.fullmatch(pattern, "num_hidden_layers")), LAYERS)
    lists = [item for item in every.values() if isinstance(item, (list, tuple)) and len(item) == before]
    kinds = [len(set(map(str, item))) for item in lists if all(isinstance(part, str) for part in item)]
    return max([wanted, *kinds])


def _cut(entries: list[Any], depth: int) -> list[Any]:
    """A list for fewer layers, with every kind of entry."""
    kinds = list({str(entry): entry for entry in entries}.values())
    return (kinds + entries)[:depth] if len(kinds) <= depth else entries[:depth]


def _small(name: str, item: Any, profile: Mapping[str, Any], ids: Iterator[int], known: dict[str, int]) -> Any:
    """The small value of a setting; None leaves it as it is."""
    if isinstance(item, float) and OFF.fullmatch(name):
        return 0.0
    if isinstance(item, float) and DROP_PATH.fullmatch(name):
        return DEPTH_DROPPED
    if item is None and (name in _UNSET or _GIVEN in profile):
        return _UNSET.get(name, next((value for pattern, value in RULES if re.fullmatch(pattern, name)), None))
    if isinstance(item, bool) or item is None or isinstance(item, (float, str)):
        return False if name in ("use_cache", "use_mems_eval", "apply_spec_augment") and item else None
    if isinstance(item, dict):
        return {**item, "mrope_section": [1, 1, 2]} if "mrope_section" in item else None
    if isinstance(item, int) and re.fullmatch(r"\w*(token_id|token_index|_token)s?", name):
        return known.setdefault(name, next(ids)) if item >= VOCABULARY - 40 else None
    for pattern, value in (*profile.items(), *RULES):
        if value is not True and re.fullmatch(pattern, name):
            return _like(item, value)
    return _listed(name, item)


def _like(item: Any, value: int) -> Any:
    """A smaller number; of a list with the same proportions."""
    if isinstance(item, int):
        return min(item, value)
    if isinstance(item, (list, tuple)) and item and all(type(part) is int and part > 0 for part in item):
        return type(item)(max(1, part * value // item[0]) for part in item)
    return None


def _listed(name: str, item: Any) -> Any:
    """Sizes of stages, of patches."""
    if re.fullmatch(r"(\w+_)?patch_size", name):
        sizes = item if isinstance(item, (list, tuple)) else [item]
        if any(isinstance(size, int) and size >= 14 for size in sizes):
            return 8 if isinstance(item, int) else type(item)(min(size, 8) for size in item)
    if not isinstance(item, (list, tuple)) or not item or not all(type(part) is int and part > 0 for part in item):
        return None
    if re.fullmatch(r"(\w+_)?(hidden_sizes|embed_dims|dims|neck_hidden_sizes)", name):
        return type(item)(max(16, part * 16 // item[0] // 16 * 16) for part in item)
    if re.fullmatch(r"(\w+_)?depths|num_blocks|layers_per_stage", name):
        return type(item)(min(part, 2) for part in item)
    return None


# --- inputs -----------------------------------------------------------------------------------------------------------


def recipes(model: Any) -> Iterator[tuple[str, Callable[[int], dict[str, Any]]]]:
    """Ways to make a batch, and the kind of its labels; those with labels and with everything first."""
    names = set(inspect.signature(model.forward).parameters)
    for inputs in _inputs(model, names):
        kinds = ("tokens", "class", "none") if "labels" in names else ("none",)
        for kind in kinds:
            yield kind, lambda size, inputs=inputs, kind=kind: _labelled(model, inputs(size), kind, names)


def _labelled(model: Any, inputs: dict[str, Any], kind: str, names: set[str]) -> dict[str, Any]:
    size = len(next(iter(inputs.values())))
    if kind == "class":
        return {**inputs, "labels": torch.randint(2, (size,))}
    if kind == "tokens":
        ids = inputs.get("input_ids")
        same = ids is not None and not getattr(model.config, "is_encoder_decoder", False)
        return {**inputs, "labels": ids.clone() if same else _ids(size)}
    if "decoder_input_ids" in names:
        return {**inputs, "decoder_input_ids": _ids(size)}
    return inputs


def _ids(size: int) -> Tensor:
    return torch.randint(5, VOCABULARY - 40, (size, TOKENS))


def _inputs(model: Any, names: set[str]) -> Iterator[Callable[[int], dict[str, Any]]]:
    sizes = _Sizes(model.config, "bbox" in names)
    if {"input_ids", "pixel_values"} <= names:
        yield lambda size: {**sizes.text(size), **sizes.image(size)}
    if "input_ids" in names:
        yield sizes.text
        if "attention_mask" in names:
            yield lambda size: {**sizes.text(size), "attention_mask": torch.ones(size, TOKENS, dtype=torch.long)}
    if "pixel_values" in names:
        yield sizes.image
        yield sizes.video
    long, mel = 2 * (sizes.of("max_source_positions") or 32), sizes.mel
    if "input_features" in names:
        yield lambda size: {"input_features": torch.randn(size, mel, long)}
        yield lambda size: {"input_features": torch.randn(size, long, mel)}
    if "input_values" in names:
        yield lambda size: {"input_values": torch.randn(size, 4000)}
        yield lambda size: {"input_values": torch.randn(size, sizes.of("max_length") or 64, mel)}


class _Sizes:
    """Inputs of the sizes that a configuration, or one inside it, asks for."""

    def __init__(self, config: Any, boxes: bool):
        self.parts = [config, *(item for item in vars(config).values() if isinstance(item, PreTrainedConfig))]
        self.boxes = boxes
        self.mel = self.of("num_mel_bins", "feature_size", "input_feat_per_channel") or MEL

    def of(self, *names: str) -> Any:
        """The first of these settings that one of the configurations has."""
        found = (getattr(part, name, None) for name in names for part in self.parts)
        return next((item for item in found if isinstance(item, (int, list, tuple))), None)

    def text(self, size: int) -> dict[str, Tensor]:
        boxes = {"bbox": torch.zeros(size, TOKENS, 4, dtype=torch.long)} if self.boxes else {}
        return {"input_ids": _ids(size), **boxes}

    def image(self, size: int) -> dict[str, Tensor]:
        side = self.of("image_size", "img_size", "input_size") or IMAGE
        sides = (side, side) if isinstance(side, int) else side
        return {"pixel_values": torch.randn(size, self.of("num_channels", "in_channels", "in_chans") or 3, *sides)}

    def video(self, size: int) -> dict[str, Tensor]:
        image = self.image(size)["pixel_values"]
        return {"pixel_values": torch.stack([image] * (self.of("num_frames") or 4), 1)}


def with_masks(family: Family) -> Family:
    """The same with padding masks that hide nothing, and one type of tokens, where its forward takes them."""
    names = inspect.signature(family.model.forward).parameters

    def recipe(size: int) -> dict[str, Any]:
        batch = family.recipe(size)
        decoder = batch.get("decoder_input_ids", batch.get("labels"))
        wanted = {"attention_mask": batch.get("input_ids"), "decoder_attention_mask": decoder}
        masks = {name: ids for name, ids in wanted.items() if name in names and isinstance(ids, Tensor)}
        batch |= {name: torch.ones(ids.shape, dtype=torch.long) for name, ids in masks.items()}
        if "token_type_ids" in names and isinstance(batch.get("input_ids"), Tensor):
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch

    return replace(family, recipe=recipe)


def without_labels(family: Family) -> Family:
    """The same without labels, whose values some check in Python; a decoder reads them instead."""
    names = inspect.signature(family.model.forward).parameters

    def recipe(size: int) -> dict[str, Any]:
        batch = family.recipe(size)
        labels = batch.pop("labels", None)
        return {**batch, "decoder_input_ids": labels} if labels is not None and "decoder_input_ids" in names else batch

    return replace(family, recipe=recipe, labels="none")


# --- models -----------------------------------------------------------------------------------------------------------


def build(name: str) -> Family:
    """The tiny model of a family.

    Raises:
        NotTiny: no rule gives one; the message is the last error.
    """
    problem: BaseException | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for architecture, profile in itertools.product(classes()[name][:3], PROFILES):
            try:
                return _built(name, getattr(transformers, architecture), profile)
            except Exception as error:  # whatever a model of others says to settings that nobody wrote for it
                problem = problem or error
    raise NotTiny(" ".join(f"{type(problem).__name__}: {problem}".split())[:300])


def _built(name: str, cls: Any, profile: Mapping[str, Any]) -> Family:
    config = configuration(name, profile)
    _check_size(cls, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        _randomise(model)
    if (
        sum(
            isinstance(module, (nn.Linear, nn.Conv1d)) or type(module).__name__ == "Conv1D"
            for module in model.modules()
        )
        < 4
    ):
        raise NotTiny("it has no linears, so it is no transformer")
    model.train()
    problem: Exception | None = None
    for labels, recipe in recipes(model):
        family = Family(name, model, recipe, labels)
        try:
            _check_runs(family)
        except Exception as error:
            problem = problem or error
        else:
            return family
    raise problem or NotTiny("no inputs are known for its forward")


def _check_size(cls: Any, config: Any) -> None:
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in cls(config).parameters())
    except Exception:  # some read values while they are built
        return
    if count > MOST_PARAMETERS:
        raise NotTiny(f"it still has {count:,} parameters")


def _randomise(model: nn.Module) -> None:
    """Moves norms, biases and what starts as zeros, so that a rewrite that drops one is seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.1)


def _seeded(model: Any, batch: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(**batch)


def _check_runs(family: Family) -> None:
    """It runs, the same twice, at several batch sizes, and has gradients."""
    batch = family.batch()
    first, second = (_seeded(family.model, batch) for _ in range(2))
    for one, other in zip(floats(first), floats(second), strict=True):
        if not torch.equal(one, other):
            raise NotTiny("its training draws random numbers")
    loss = family.loss(first)
    if family.labels != "none" and not (isinstance(first, Mapping) and isinstance(first.get("loss"), Tensor)):
        raise NotTiny("it has no loss with these labels")
    if not loss.isfinite():
        raise NotTiny("its loss is not finite")
    loss.backward()
    family.model.zero_grad()
    for size in (2, 3, 5):
        family.model(**family.batch(1, size))
