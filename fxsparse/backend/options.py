"""The options of ``torch.compile(model, backend="fxsparse", mode=..., options={...})``, checked and in one form."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fxsparse.errors import OptionError
from fxsparse.lowering.pins import LOWERINGS, Pins
from fxsparse.options import Weight, check_fields, checked, shown

if TYPE_CHECKING:
    from fxsparse.passes.pipeline import Pipeline

OURS = ("passes", "recipe", "weights", "lower", "tune", "fallback", "compiler")


@dataclass(frozen=True)
class BackendOptions:
    """What a call of ``torch.compile`` asked for.

    Attributes:
        pipeline: the passes to run on every graph, None for the bare call.
        weights: ``dense``, the model's own and masked, or ``compressed``, which replaces them at the first call.
        lower: the implementation that is pinned, by operator.
        tune: seconds that a graph may spend on measuring products nobody measured before.
        fallback: whether a graph that cannot be lowered runs as it was; otherwise that is an error.
        compiler: what compiles the lowered graph: ``inductor``, or ``aot_eager`` and ``eager`` to debug.
        inductor: Inductor's configuration, mode included.
    """

    pipeline: Pipeline | None = None
    weights: Literal["dense", "compressed"] = "dense"
    lower: tuple[tuple[str, str], ...] = ()
    tune: Weight = 30.0
    fallback: bool = True
    compiler: Literal["inductor", "aot_eager", "eager"] = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.weights == "compressed":
            _check_compresses(self.pipeline)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> BackendOptions:
        """Checks the options of a call of ``torch.compile``.

        Raises:
            OptionError: an option that neither fxsparse nor Inductor knows, or a value it cannot have.
        """
        theirs = dict(checked("options", options, Mapping[str, Any] | None) or {})
        ours = {name: theirs.pop(name) for name in OURS if name in theirs}
        plain = {name: ours[name] for name in ours if name in ("weights", "fallback", "compiler")}
        plain["tune"] = ours.get("tune", cls.tune)
        if plain["tune"] in (None, False):
            plain["tune"] = 0.0
        return cls(pipeline=_pipeline(ours), lower=_lower(ours.get("lower")), inductor=_inductor(theirs, mode), **plain)

    @property
    def pins(self) -> Pins:
        """What was said of implementations."""
        return Pins(self.lower)

    def __str__(self) -> str:
        """Equal options have equal text; it is part of the compile caches' key."""
        inductor = sorted((name, repr(value)) for name, value in self.inductor.items())
        return f"passes={self.pipeline or ''};lower={self.lower};compiler={self.compiler};inductor={inductor}"


def _pipeline(ours: Mapping[str, Any]) -> Pipeline | None:
    if ours.get("passes") is not None and ours.get("recipe") is not None:
        raise OptionError("give passes or recipe, not both: a recipe is a name for passes")
    from fxsparse.passes import Pass, Pipeline

    if (name := ours.get("recipe")) is not None:
        from fxsparse.recipes import recipe

        return name if isinstance(name, Pipeline) else recipe(name)
    passes = ours.get("passes")
    if passes is None or passes == "":
        return None
    if not isinstance(passes, (Pipeline, Pass, str, list, tuple)):
        raise OptionError(f"passes are text, Pass objects, a list of these, or a Pipeline, not {type(passes).__name__}")
    if isinstance(passes, Pipeline):
        return passes if passes.passes else None
    items = [passes] if isinstance(passes, (Pass, str)) else passes
    flat = [part for item in items for part in (item.passes if isinstance(item, Pipeline) else (item,))]
    return Pipeline(flat) if flat else None


def _check_compresses(pipeline: Pipeline | None) -> None:
    if pipeline is None:
        raise OptionError('weights="compressed" is for the passes of a call, and there are none: give passes or recipe')
    for item in pipeline.passes:
        if getattr(item, "storage", "compressed") != "compressed":
            raise OptionError(
                'weights="compressed" has no place for pruned weights, which storage="masked" keeps (as dynamic masks '
                "need): leave out one of the two",
                pass_name=item.name,
            )


def _lower(lower: Any) -> tuple[tuple[str, str], ...]:
    if lower is None:
        return ()
    if not isinstance(lower, Mapping):
        raise OptionError(
            f'lower maps operators to implementations, as in {{"nm_linear": "dense"}}, not {shown(lower)}'
        )
    for op, choice in lower.items():
        if op not in LOWERINGS:
            raise OptionError(f"lower: {_unknown('operator', op, LOWERINGS)}")
        words = [word.strip() for word in choice.split(",")] if isinstance(choice, str) else [choice]
        excludes = all(isinstance(word, str) and word.startswith("-") for word in words)
        if len(words) > 1 and not excludes:
            raise OptionError(
                f"lower[{op!r}]={shown(choice)} must be one name, or names to exclude, each after a minus"
            )
        for word in words:
            known = LOWERINGS[op][1 if excludes else 0 :]
            if (word[1:] if excludes else word) not in known:
                raise OptionError(f"lower[{op!r}]={shown(word)} is none of {', '.join(map(repr, known))}")
    return tuple(sorted((op, choice) for op, choice in lower.items() if choice != "auto"))


def _inductor(theirs: Mapping[str, Any], mode: str | None) -> dict[str, Any]:
    """Inductor's own options, checked and expanded by torch itself."""
    mode = checked("mode", mode, str | None)
    if not theirs and mode in (None, "default"):
        return {}
    import torch

    options = {name.replace("-", "_"): value for name, value in theirs.items()}
    for name in options:
        if name not in _inductor_names():
            raise OptionError(_unknown("option", name, (*OURS, *sorted(_inductor_names()))))
    if options.get("freezing"):
        raise OptionError(
            "freezing=True freezes nothing under a backend that torch.compile calls, and keeps the compile caches from "
            "working; frozen N:M weights are found without it"
        )
    try:
        return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)
    except Exception as error:  # torch's own check of a user's value, whatever it raises
        raise OptionError(str(error)) from error


@functools.cache
def _inductor_names() -> frozenset[str]:
    import torch._inductor

    return frozenset(torch._inductor.list_options())


def _unknown(kind: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=3) if len(str(name)) <= 100 else []
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"fxsparse's own are {', '.join(OURS)}"
    return f"unknown {kind} {shown(name)}; {hint}"
