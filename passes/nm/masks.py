"""N:M sparse weights: in every group of m consecutive weights along the input dimension, n are kept.

    y = x (W^R)^T + b        W^R = W * mask, mask [out, in], n of every m kept along in

SLoPe (arXiv 2405.16325) fixes the mask before training and keeps only the surviving values, which are then the
parameter: gradients and optimizer states shrink with it. Its paper describes a random mask at initialisation; its code
takes the largest magnitudes, which is the same on a fresh initialisation. Both are offered.

Dynamic masks on dense weights are baselines: SR-STE (Zhou et al., arXiv 2102.04010) prunes in the forward pass, passes
the gradient straight through to every weight and pulls pruned weights towards zero. The pull is added to the gradient
once per optimizer step, for any optimizer. Transposable masks keep n of m along both dimensions, so that forward and
backward products are N:M without a second pruning.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

import torch
from annotated_types import Interval, MinLen
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.activation_norms import activation_norms
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph import ExpertLinear, Linear, live
from fxsparse.graph.derived_buffers import BORROWED, Derived, derive
from fxsparse.graph.record import Change, HeldWeight, hold, rewrote, skipped
from fxsparse.ops.nm import WITH_KERNELS, Pattern, PatternText, pack
from fxsparse.options import Count, Glob, Globs, Seed, Weight
from fxsparse.passes.base import Pass
from fxsparse.passes.event import Event
from fxsparse.passes.nm.branch import Additions
from fxsparse.passes.nm.convolutions import (
    CONVOLUTION,
    Convolution,
    convolutions,
    insert_mask,
    masked_convolutions,
)
from fxsparse.passes.nm.experts import EXPERTS, call_compressed, call_masked
from fxsparse.passes.nm.rules import Criterion, NMMask
from fxsparse.passes.nm.sparse_linear import sparse_linears
from fxsparse.passes.nm.sparsegpt import Pruned, sparsegpt
from fxsparse.passes.nm.sr_ste import DynamicMasks
from fxsparse.passes.pipeline import structure_only

_Site = list[Linear] | list[ExpertLinear]
"""The products that share a weight."""
_ADAPTER = re.compile(r"(\w*lora|\w*vera|hira|lily|adamss|peanut|stride)_(\w+_)?[A-E]")  # PEFT's names of their parts


@dataclass(frozen=True)
class InsertNMMasks(Pass):
    """Makes the weights of linears N:M sparse, and those of experts: each expert's matrix on its own, along its input.

    Attributes:
        pattern: ``"2:4"`` for all linears, or a mapping from globs over module paths to patterns,
            ``{"*.layers.[0-5].*": "2:4", "*.layers.[6-9].*": "2:8"}``; the first glob that matches a path counts,
            and a path without a match stays dense. There are kernels for 1:2, 2:4, 1:4, 2:8 and 4:8; weights of other
            patterns (2:16) are expanded, which saves memory and no time.
        criterion: which weights stay: ``magnitude``, ``random``, ``wanda`` (|weight| times the norm of its input over
            the calibration batches; Sun et al., arXiv 2306.11695), or ``sparsegpt``, which also changes those that stay
            so that outputs change little (Frantar and Alistarh, arXiv 2301.00774; `fxsparse.passes.nm.sparsegpt`).
        storage: ``compressed`` keeps the surviving values as the parameter ``<weight>_values [out, in*n/m]`` and
            ``<weight>_indices`` as a buffer; ``masked`` keeps the dense weight and a boolean buffer ``<weight>_mask``.
        transposable: keep n of m along the output dimension too.
        dynamic: SR-STE: recompute the mask from the magnitudes while training (needs ``masked`` and a Schedule).
        every: optimizer steps between two masks of a dynamic pass.
        decay: SR-STE's pull on pruned weights, added to their gradient; 2e-4 is the original's.
        dense_after: fraction of the training steps after which a dynamic pass goes on dense, with pruned weights at the
            values they have reached, as FST does (Hu et al., arXiv 2404.01847); 0.83 leaves it a sixth. 1 is never.
        exclude: globs over module paths that stay dense.
        convolutions: prune the filters of convolutions too, along their channels and taps in the order of memory. They
            are held masked, and their masks do not move. Those of patches are first after the input (``keep_first``).
        keep_first: leave the first linears after the input dense.
        keep_head: leave the heads dense.
        keep_adapters: leave the adapters of a PEFT model (``lora_A``, ``lora_B`` and alike) dense: they are small, and
            all that trains.
        seed: of ``random``.
        calibration: batches for ``wanda`` and ``sparsegpt``: mappings of keyword arguments, tuples of arguments, or
            single tensors.

    Raises:
        OptionError: an option is out of range.
        RewriteError: a glob matches no linear.
    """

    name: ClassVar[str] = "nm-masks"
    rest: ClassVar[str] = "kept dense, masks are for the matrices of linears and experts"
    cannot_follow: ClassVar[tuple[str, ...]] = ("select-tensors", "gates", "drop-dims")
    pattern: PatternText | Annotated[Mapping[Glob, PatternText], MinLen(1)] = "2:4"
    criterion: Criterion = "magnitude"
    storage: Literal["compressed", "masked"] = "compressed"
    transposable: bool = False
    dynamic: bool = False
    every: Count = 1
    decay: Weight = 2e-4
    dense_after: Annotated[float, Interval(gt=0, le=1)] = 1.0
    exclude: Globs = ()
    convolutions: bool = False
    keep_first: bool = True
    keep_head: bool = True
    keep_adapters: bool = True
    seed: Seed = 0
    calibration: Iterable[Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dynamic and self.storage != "masked":
            raise OptionError('dynamic masks need the pruned weights: use storage="masked"', pass_name=self.name)
        if self.dynamic and self.criterion == "sparsegpt":
            raise OptionError(
                "sparsegpt chooses masks once and changes the weights for them; dynamic masks follow magnitudes",
                pass_name=self.name,
            )
        if self.dense_after < 1 and not self.dynamic:
            raise OptionError(
                'dense_after needs the pruned weights alive: use dynamic=True and storage="masked"',
                pass_name=self.name,
            )

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        sites, filters = _sites(graph), list(convolutions(graph))
        self._check_globs([site[0].path for site in sites], [conv.path for conv in filters])
        reasons = _DenseByDefault(graph, self.keep_first, self.keep_head, self.keep_adapters)
        chosen: list[tuple[_Site, Pattern]] = []
        for site in sites:
            pattern, reason = self._pattern_for(site[0])
            reason = reason or reasons(site) or self._keeps_experts(site[0])
            if reason is None and pattern is not None:
                reason = self._misfit(site[0], pattern)
            if reason is None and pattern is not None:
                chosen.append((site, pattern))
            else:
                yield skipped(site[0].path, f"kept dense, {reason}")
        yield from self._prune_convolutions(graph, filters, reasons)
        sparse = list(sparse_linears(graph))
        for linear in sparse:
            yield skipped(linear.path, f"is already {linear.pattern}")
        if not sites and not sparse and not filters:
            yield skipped("the model", "has no linears to prune")
        of_linears = [(site, pattern) for site, pattern in chosen if _is_of_linears(site)]
        norms = self._norms(graph, [site for site, _ in chosen])
        pruned = self._pruned(graph, of_linears)
        names = fx.parameter_names(graph)
        for site, pattern in chosen:
            name = site[0].name
            all_names = tuple(names[id(fx.attribute(graph, name))])
            yield self._sparsify(graph, site, pattern, pruned.get(name) or norms.get(name), all_names)

    # --- which weights ---

    def _pattern_for(self, linear: Linear | ExpertLinear | Convolution) -> tuple[Pattern | None, str | None]:
        for glob in self.exclude:
            if fnmatch.fnmatchcase(linear.path, glob):
                return None, f"excluded by {glob!r}"
        if isinstance(self.pattern, str):
            return Pattern.parse(self.pattern), None
        for glob, pattern in dict(self.pattern).items():
            if fnmatch.fnmatchcase(linear.path, glob):
                return Pattern.parse(pattern), None
        return None, "no glob of the pattern matches it"

    def _check_globs(self, paths: list[str], of_convolutions: list[str]) -> None:
        paths = [*paths, *of_convolutions] if self.convolutions else paths
        globs = [*self.exclude, *(() if isinstance(self.pattern, str) else dict(self.pattern))]
        for glob in globs:
            if not any(fnmatch.fnmatchcase(path, glob) for path in paths):
                shown = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
                raise RewriteError(
                    f"the glob {glob!r} matches no linear; there are: {shown or 'none'}", pass_name=self.name
                )

    def _keeps_experts(self, linear: Linear | ExpertLinear) -> str | None:
        if isinstance(linear, ExpertLinear) and self.criterion == "sparsegpt":
            return f"{EXPERTS}, and sparsegpt calibrates linears only; prune it by wanda or magnitude in a pass before"
        return None

    def _misfit(self, linear: Linear | ExpertLinear, pattern: Pattern) -> str | None:
        dtype = fx.value(linear.weight).dtype
        if not dtype.is_floating_point:
            return f"its weight is {dtype}, not a real floating-point type"
        if linear.in_features % pattern.m:
            return f"{linear.in_features} columns, not a multiple of {pattern.m}"
        if self.transposable and linear.out_features % pattern.m:
            return f"{linear.out_features} rows, not a multiple of {pattern.m} as a transposable mask needs"
        return None

    # --- convolutions ---

    def _prune_convolutions(
        self, gm: GraphModule, filters: list[Convolution], reasons: _DenseByDefault
    ) -> Iterator[Change]:
        done = masked_convolutions(gm)
        for held in done:
            yield skipped(fx.module_path(held.name), f"is already {held.pattern}")
        for conv in filters:
            pattern, reason = self._pattern_for(conv) if self.convolutions else (None, None)
            reason = reason or self._keeps_filters(gm, conv, pattern) or reasons.of_place(conv.node)
            if reason is not None or pattern is None:
                yield skipped(conv.path, f"kept dense, {reason}")
            else:
                yield self._sparsify_filters(gm, conv, pattern)

    def _keeps_filters(self, gm: GraphModule, conv: Convolution, pattern: Pattern | None) -> str | None:
        if pattern is None:
            return f"{CONVOLUTION} (convolutions=True sparsifies it)"
        if conv.weight is None:
            return f"{CONVOLUTION} whose weight is computed, not read"
        if self.dynamic or self.transposable or self.criterion not in ("magnitude", "random"):
            option = "dynamic" if self.dynamic else "transposable" if self.transposable else self.criterion
            return f"{CONVOLUTION}, and {option} masks are of linears only"
        if len(conv.weight.users) > 1 or len(fx.reads(gm)[id(fx.attribute(gm, conv.name))]) > 1:
            return f"{CONVOLUTION} whose weight is read more than once"
        weight = fx.value(conv.weight)
        if not weight.dtype.is_floating_point:
            return f"its weight is {weight.dtype}, not a real floating-point type"
        if weight[0].numel() % pattern.m:
            return f"{weight[0].numel()} weights in each filter, not a multiple of {pattern.m}"
        return None

    def _sparsify_filters(self, gm: GraphModule, conv: Convolution, pattern: Pattern) -> Change:
        borrowed = bool(gm.meta.get(BORROWED))
        weight = fx.attribute(gm, conv.name).detach()
        criterion = "magnitude" if structure_only(gm) else self.criterion
        rule = NMMask(str(pattern), criterion, seed=self.seed, filters=True)
        fx.set_buffer(gm, f"{conv.name}_mask", rule(weight))
        if borrowed:
            derive(gm, f"{conv.name}_mask", Derived(rule, (conv.name,)))
        insert_mask(gm, conv)
        names = tuple(fx.parameter_names(gm)[id(fx.attribute(gm, conv.name))])
        hold(gm, [HeldWeight(conv.name, "masked", str(pattern), False, weight[0].numel(), names)])
        return rewrote(conv.path, f"{pattern}, {self.criterion}, masked, as convolutions always are")

    # --- how ---

    def _batches(self, graph: GraphModule) -> Iterable[Any]:
        if graph.meta.get(BORROWED):
            raise RewriteError(
                f"{self.criterion} needs to run the model on calibration batches, which the one-line call cannot do; "
                "call fxsparse.rewrite and compile its result",
                pass_name=self.name,
            )
        if self.calibration is None:
            raise RewriteError(f"{self.criterion} needs calibration=[batch, ...]", pass_name=self.name)
        return self.calibration

    def _norms(self, graph: GraphModule, sites: list[_Site]) -> dict[str, Tensor]:
        if self.criterion != "wanda" or structure_only(graph):
            return {}
        return activation_norms(graph, [linear for site in sites for linear in site], self._batches(graph))

    def _pruned(self, graph: GraphModule, chosen: list[tuple[list[Linear], Pattern]]) -> dict[str, Pruned]:
        if self.criterion != "sparsegpt" or structure_only(graph):
            return {}
        return sparsegpt(graph, chosen, self._batches(graph), self.transposable)

    def _sparsify(
        self, gm: GraphModule, site: _Site, pattern: Pattern, by: Pruned | Tensor | None, names: tuple[str, ...]
    ) -> Change:
        borrowed = bool(gm.meta.get(BORROWED))
        storage = "masked" if borrowed else self.storage
        name, transposed = site[0].name, site[0].transposed
        weight = fx.attribute(gm, name)
        dense = weight.detach().mT if transposed else weight.detach()
        criterion = "magnitude" if structure_only(gm) else self.criterion
        rule = NMMask(str(pattern), criterion, self.transposable, self.seed, transposed)
        if isinstance(by, Pruned):
            dense, mask, error = by.weight, by.mask, f", {by}"
        else:
            mask, error = rule.with_norms(weight.detach(), by), ""
        dense_part = "" if self.dense_after == 1 else f", dense from {self.dense_after:.0%} of the steps on"
        if storage == "compressed":
            values, indices = pack(dense, mask, pattern)
            fx.set_parameter(gm, f"{name}_values", values, requires_grad=weight.requires_grad)
            fx.set_buffer(gm, f"{name}_indices", indices)
            live.moved(gm, names, f"{name}_values")
        else:
            fx.set_buffer(gm, f"{name}_mask", mask)
            if isinstance(by, Pruned):
                fx.replace_parameter(gm, names, dense.t().contiguous() if transposed else dense)
            if borrowed:
                derive(gm, f"{name}_mask", Derived(rule, (name,)))
        for linear in site:
            _call_compressed(gm, linear, pattern) if storage == "compressed" else self._call_masked(gm, linear)
        along_out = str(pattern) if self.transposable else ""
        experts = site[0].experts if isinstance(site[0], ExpertLinear) else 0
        held = HeldWeight(name, storage, str(pattern), transposed, site[0].in_features, names, along_out, experts)
        hold(gm, [held])
        kind = "transposable " if self.transposable else ""
        has_kernel = storage == "masked" or ((pattern.n, pattern.m) in WITH_KERNELS and not experts)
        slow = "" if has_kernel else f"; no kernel multiplies by {pattern}, the weight is expanded"
        of_experts = f", {experts} experts" if experts else ""
        said = f"{kind}{pattern}, {self.criterion}, {storage}{of_experts}{error}{dense_part}{slow}"
        return rewrote(site[0].path, said)

    def _call_masked(self, gm: GraphModule, linear: Linear | ExpertLinear) -> None:
        if isinstance(linear, ExpertLinear):
            call_masked(gm, linear, self.dynamic)
            return

        def masked(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
            rows = weight.t() if linear.transposed else weight
            return torch.ops.fxsparse.masked_linear(x, rows, mask, None, bias, self.dynamic)

        inputs = (linear.input, linear.weight, f"{linear.name}_mask", linear.bias)
        fx.replace(linear.node, fx.insert_function(gm, masked, *inputs, before=linear.node))

    @property
    def needs_schedule(self) -> bool:
        return self.dynamic

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        if self.dynamic:
            sparse_steps = round(self.dense_after * total_steps)
            yield DynamicMasks(
                self,
                graph,
                decay=self.decay,
                every=self.every,
                transposable=self.transposable,
                dense_from=sparse_steps if sparse_steps < total_steps else None,
            )


def _call_compressed(gm: GraphModule, linear: Linear | ExpertLinear, pattern: Pattern) -> None:
    if isinstance(linear, ExpertLinear):
        call_compressed(gm, linear, pattern)
        return
    values = fx.insert_attribute(gm, f"{linear.name}_values", before=linear.node)
    indices = fx.insert_attribute(gm, f"{linear.name}_indices", before=linear.node)
    args = (linear.input, values, indices, None, linear.bias, pattern.n, pattern.m)
    fx.replace_with_call(gm, linear.node, torch.ops.fxsparse.nm_linear.default, args)


def _sites(gm: GraphModule) -> list[_Site]:
    """The linears of a graph and the products of experts, those that share a weight together."""
    sites: dict[int, Any] = {}
    every: list[Linear | ExpertLinear] = [*fx.linears(gm), *fx.expert_linears(gm)]
    for linear in every:
        sites.setdefault(id(fx.attribute(gm, linear.name)), []).append(linear)
    return list(sites.values())


def _is_of_linears(site: _Site) -> TypeGuard[list[Linear]]:
    """Whether the products of a site are linears."""
    return isinstance(site[0], Linear)


class _DenseByDefault:
    """Says why a weight stays dense though no option excludes it; None if nothing speaks against pruning it."""

    def __init__(self, gm: GraphModule, keep_first: bool, keep_head: bool, keep_adapters: bool):
        self.gm, self.keep_adapters = gm, keep_adapters
        self.reads = fx.reads(gm)
        self.first: set[Node] = fx.first_linears(gm) if keep_first else set()
        self.heads: set[Node] = fx.head_linears(gm) if keep_head else set()
        self.additions = Additions(gm)

    def __call__(self, site: _Site) -> str | None:
        if reason := self.additions.reason(site[0].name):
            return reason
        reads = self.reads[id(fx.attribute(self.gm, site[0].name))]
        for read in reads:
            for user in read.users:
                if fx.is_embedding(user):
                    return f"tied to the embedding {fx.stack_path(user) or user.name}"
        if sum(len(read.users) for read in reads) > len(site):
            return "its weight is also read by something that is not a linear"
        if len({linear.transposed for linear in site}) > 1:
            return "its weight is shared by linears that read it in different orientations"
        adapter = next(filter(_ADAPTER.fullmatch, site[0].name.split(".")), None)
        if self.keep_adapters and adapter:
            return f"it is part of an adapter, {adapter} (keep_adapters=False sparsifies it)"
        return next(filter(None, (self.of_place(linear.node) for linear in site)), None)

    def of_place(self, node: Node) -> str | None:
        """What its place in the model says of a linear or a convolution."""
        if node in self.heads:
            return "it is a head (keep_head=False sparsifies it)"
        if node in self.first:
            return "it is the first linear after the input (keep_first=False sparsifies it)"
        return None
