"""What was done to a graph: which passes ran, what each changed or skipped and why, and what it cost before and after.

The record of a graph module is ``gm.meta["fxsparse"]``. It is plain data: it serialises to JSON, and the passes in
it can be replayed on the original model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.fx import GraphModule

from fxsparse.version import __version__

META_KEY = "fxsparse"
TRACE_KEY = "fxsparse_trace"


@dataclass(frozen=True)
class Change:
    """What a pass did at one site.

    Attributes:
        site: module path or parameter name.
        rewritten: False where the site was left as it was.
        detail: what was done, or the reason it was not.
    """

    site: str
    rewritten: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.site}: {self.detail}"


def rewrote(site: str, detail: str) -> Change:
    return Change(site, True, detail)


def skipped(site: str, reason: str) -> Change:
    return Change(site, False, reason)


@dataclass(frozen=True)
class Costs:
    """The size of a model at the sizes it was traced with.

    Attributes:
        forward_flops: FLOPs of the forward pass.
        step_flops: FLOPs of the forward and the backward pass.
        parameters: number of parameter elements.
        parameter_bytes: bytes of the parameters.
        buffer_bytes: bytes of the buffers (masks, indices).
        optimizer_bytes: bytes of two moments for every trainable parameter, as torch's AdamW keeps them.
    """

    forward_flops: int
    step_flops: int
    parameters: int
    parameter_bytes: int
    buffer_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class Entry:
    """One pass of a record.

    Attributes:
        text: the pass and its options, as ``Pipeline.parse`` reads them.
        changes: one for every site the pass looked at.
        before, after: the model's costs around the pass.
        milliseconds: how long the pass took.
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
    """How a weight of the original model is held after a rewrite.

    Attributes:
        name: the original full name, such as ``model.layers.0.fc1.weight``.
        storage: ``compressed`` (values and indices) or ``masked`` (dense weight and mask).
        pattern: ``n:m``, along the input dimension.
        transposed: whether the original is stored ``[in, out]``.
        in_features: length of the input dimension.
        names: all names of the original where it was tied, ``name`` included.
    """

    name: str
    storage: str
    pattern: str
    transposed: bool
    in_features: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """Everything that was done to a model, in order.

    Attributes:
        entries: the passes.
        weights: how the weights that passes replaced are held now.
        notes: what tracing had to do.
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
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Record:
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


def record_of(gm: GraphModule) -> Record:
    """The record of a graph module; an empty one where nothing was done yet."""
    record = gm.meta.get(META_KEY)
    if isinstance(record, Record):
        return record
    return Record(notes=tuple(getattr(gm.meta.get(TRACE_KEY), "notes", ())), version=__version__)


def hold(gm: GraphModule, weights: Iterable[HeldWeight]) -> None:
    """Notes how replaced weights are held; a later note on the same weight replaces the earlier one."""
    record = record_of(gm)
    held = {weight.name: weight for weight in record.weights}
    held.update((weight.name, weight) for weight in weights)
    gm.meta[META_KEY] = replace(record, weights=tuple(held.values()))


def append(gm: GraphModule, entry: Entry) -> None:
    """Adds a pass to the record."""
    record = record_of(gm)
    gm.meta[META_KEY] = replace(record, entries=(*record.entries, entry))


def substitute(gm: GraphModule, old: str, new: str) -> None:
    """Rewrites the text of a pass in the record, where what it described came to pass in another form."""
    record = record_of(gm)
    entries = tuple(replace(entry, text=new) if entry.text == old else entry for entry in record.entries)
    gm.meta[META_KEY] = replace(record, entries=entries)
