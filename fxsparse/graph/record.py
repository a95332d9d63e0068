"""The record of a graph module: the passes that ran, their changes and reasons, and the costs before and after each.

    Record
      entries: Entry, one for each pass      its text, the costs around it, its time
        changes: Change, one for each site   rewritten or skipped, and the reason
      weights: HeldWeight                    the form in which a weight of the original model is held now

The record is stored in ``gm.meta["fxsparse"]``. It is plain data: it serialises to JSON, and its passes can be replayed
on the original model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from fxsparse.graph.state import meta_of
from fxsparse.version import __version__

META_KEY = "fxsparse"
TRACE_KEY = "fxsparse_trace"
NAMES_KEY = "fxsparse_names"
"""In the meta of a module form: the graph's name of each tensor that has another one in the module."""


@dataclass(frozen=True)
class Change:
    """The result of a pass at one site.

    Attributes:
        site: module path or parameter name.
        rewritten: whether the pass changed the site.
        detail: the change, or the reason for leaving the site unchanged.
    """

    site: str
    rewritten: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.site}: {self.detail}"


def rewrote(site: str, detail: str) -> Change:
    """A changed site."""
    return Change(site, True, detail)


def skipped(site: str, reason: str) -> Change:
    """An unchanged site."""
    return Change(site, False, reason)


@dataclass(frozen=True)
class Costs:
    """The costs of a model at its traced sizes.

    Attributes:
        forward_flops: FLOPs of the forward pass.
        step_flops: FLOPs of the forward and the backward pass.
        parameters: number of parameter elements.
        parameter_bytes: bytes of the parameters.
        buffer_bytes: bytes of the buffers (masks, indices).
        optimizer_bytes: bytes of two moments for every trainable parameter, as in torch's AdamW.
        nm_step_flops: FLOPs of the forward and the backward pass on hardware that skips what is pruned n:m along the
            dimension it sums over (`fxsparse.cost.nm_hardware`); None in records of earlier versions.
    """

    forward_flops: int
    step_flops: int
    parameters: int
    parameter_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    nm_step_flops: int | None = None


@dataclass(frozen=True)
class Entry:
    """One pass of a record.

    Attributes:
        text: the pass and its options, readable by ``Pipeline.parse``.
        changes: one for every site that the pass considered.
        before, after: the model's costs before and after the pass.
        milliseconds: the run time of the pass.
    """

    text: str
    changes: tuple[Change, ...]
    before: Costs
    after: Costs
    milliseconds: float

    @property
    def rewritten(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.rewritten)

    @property
    def skipped(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if not change.rewritten)


@dataclass(frozen=True)
class HeldWeight:
    """The form in which a weight of the original model is held after a rewrite.

    Attributes:
        name: the original full name, such as ``model.layers.0.fc1.weight``.
        storage: ``compressed`` (values and indices) or ``masked`` (dense weight and mask).
        pattern: ``n:m`` along the input dimension.
        transposed: whether the original is stored ``[in, out]``.
        in_features: length of the input dimension.
        names: all names of the original, ``name`` included; several if it was tied.
        backward: ``n:m`` along the output dimension, of the weight in the gradient of the input; empty if not n:m.
    """

    name: str
    storage: str
    pattern: str
    transposed: bool
    in_features: int
    names: tuple[str, ...]
    backward: str = ""


@dataclass(frozen=True)
class Record:
    """All changes to a model, in order.

    Attributes:
        entries: the passes.
        weights: the current form of every replaced weight.
        notes: changes that tracing had to make.
        version: the version of fxsparse that wrote the record.
    """

    entries: tuple[Entry, ...] = ()
    weights: tuple[HeldWeight, ...] = ()
    notes: tuple[str, ...] = ()
    version: str = ""

    @property
    def text(self) -> str:
        """The passes as one pipeline, readable by ``Pipeline.parse``."""
        return ",".join(entry.text for entry in self.entries)

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Reads a record written by `to_json`."""
        data = json.loads(text)
        return cls(
            entries=tuple(_entry(item) for item in data["entries"]),
            weights=tuple(HeldWeight(**{**item, "names": tuple(item["names"])}) for item in data["weights"]),
            notes=tuple(data["notes"]),
            version=data["version"],
        )


def _entry(data: dict[str, Any]) -> Entry:
    return Entry(
        text=data["text"],
        changes=tuple(Change(**change) for change in data["changes"]),
        before=Costs(**data["before"]),
        after=Costs(**data["after"]),
        milliseconds=data["milliseconds"],
    )


def record_of(gm: nn.Module) -> Record:
    """The record of a graph module, or of its module form; a record without passes if none ran yet."""
    meta = meta_of(gm)
    record = meta.get(META_KEY)
    if isinstance(record, Record):
        return record
    return Record(notes=tuple(getattr(meta.get(TRACE_KEY), "notes", ())), version=__version__)


def hold(gm: nn.Module, weights: Iterable[HeldWeight]) -> None:
    """Notes the form of replaced weights in the record; a later note on the same weight replaces the earlier one."""
    record = record_of(gm)
    held = {weight.name: weight for weight in record.weights}
    held.update((weight.name, weight) for weight in weights)
    meta_of(gm)[META_KEY] = replace(record, weights=tuple(held.values()))


def append(gm: nn.Module, entry: Entry) -> None:
    """Adds a pass to the record."""
    record = record_of(gm)
    meta_of(gm)[META_KEY] = replace(record, entries=(*record.entries, entry))


def substitute(gm: nn.Module, old: str, new: str) -> None:
    """Replaces the text of a pass in the record, when a change during training has made it wrong for a replay."""
    record = record_of(gm)
    entries = tuple(replace(entry, text=new) if entry.text == old else entry for entry in record.entries)
    meta_of(gm)[META_KEY] = replace(record, entries=entries)
