"""The submodule of a user's model that holds what the passes of a one-line call added to it.

``torch.compile(model, backend="fxsparse", options={"recipe": ...})`` rewrites the model when it is first called. The
rewritten graph module reads the model's own parameters; what passes added (masks, gates, branches, keys, flags) is
registered once, here, so that it is in the model's ``state_dict``, moves with it and is copied with it:

    model                    the user's, as it was; its forward too
      ._fxsparse             AddedState: parameters and buffers under the graph's names
          .graph             the rewritten graph module, which is no submodule
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse.errors import OptionError
from fxsparse.graph.state import parameter_names, tensors_of

NAME = "_fxsparse"
"""The name of the submodule."""


class AddedState(nn.Module):
    """What passes added to the model that this is a submodule of.

    Attributes:
        graph: the rewritten graph module; None until the model is first called.
        passes: the text of its passes.
        scheduled: whether there is a schedule, or its absence was said.
        waiting: called with the graph module once there is one, or with the model once it is compressed in place.
        asked: ``requires_grad`` of the model's parameters as it was before passes froze some, by name.
        flags: the modules of the model, each with the graph's module of its name, which reads its mode.
        shared: the tensors of the model that the graph reads, by name.
        whole: makes a graph of the model with what was added to it, where passes ran on each of Dynamo's graphs.
    """

    def __init__(self) -> None:
        super().__init__()
        vars(self).update(graph=None, passes="", scheduled=False, waiting=[], asked={}, flags=[], shared={}, whole=None)

    graph: GraphModule | None
    passes: str
    waiting: list[Callable[[nn.Module], None]]
    scheduled: bool
    asked: dict[str, bool]
    flags: list[tuple[nn.Module, nn.Module]]
    shared: dict[str, Tensor]
    whole: Callable[[nn.Module], GraphModule] | None

    def hold(self, graph: GraphModule, model: nn.Module, passes: str) -> None:
        """Registers what ``graph`` has beyond ``model``, from which it was made, and tells who waits for it."""
        self.asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        read_of_model(graph, model)
        with set_aside(model):
            theirs = {id(tensor) for tensor in tensors_of(model).values()}
        for path, module in graph.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in theirs:
                    _owner(self, path).register_parameter(name, parameter)
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in theirs:
                    chosen = self.find(f"{path}.{name}" if path else name)
                    if chosen is not None:  # for a part of the model, before the whole was rewritten
                        buffer.copy_(chosen)
                    persistent = name not in module._non_persistent_buffers_set
                    _owner(self, path).register_buffer(name, buffer, persistent=persistent)
        vars(self).update(graph=graph, passes=passes, shared=tensors_of(model))
        modules = dict(graph.named_modules())
        pairs = ((module, modules.get(path)) for path, module in model.named_modules())
        vars(self)["flags"] = [(module, twin) for module, twin in pairs if twin is not None]
        waiting, self.waiting = self.waiting, []
        for bind in waiting:
            bind(graph)

    def check_passes(self, passes: str) -> None:
        """Notes which passes the model is rewritten by; both forms of the one-line call share what they add.

        Raises:
            OptionError: the model was rewritten by others.
        """
        if self.passes not in ("", passes):
            raise OptionError(
                f"the model was compiled with passes={self.passes!r} before, and what they added to it would be lost; "
                "call fxsparse.forget(model) first, and torch.compile anew"
            )
        self.passes = passes

    def find(self, name: str) -> Tensor | None:
        """The buffer that passes added under ``name``; None if they added none."""
        path, _, leaf = name.rpartition(".")
        owner: nn.Module | None = self
        for part in filter(None, path.split(".")):
            owner = None if owner is None else owner._modules.get(part)
        return None if owner is None else owner._buffers.get(leaf)

    def register(self, name: str, buffer: Tensor) -> None:
        """Registers a buffer that passes added to a part of the model."""
        path, _, leaf = name.rpartition(".")
        _owner(self, path).register_buffer(leaf, buffer)

    def forward(self, x: Any) -> Any:
        """Nothing; a model that calls all of its parts in turn, such as ``nn.Sequential``, calls this one too."""
        return x

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).__annotations__:  # a graph module that is assigned would become a submodule
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    def follow_modes(self) -> None:
        """Puts every module of the graph into the mode of the model's module of its name."""
        for module, twin in self.flags:
            if twin.training is not module.training:
                twin.training = module.training

    def set_shared(self, name: str, tensor: Tensor) -> None:
        """Lets the graph read ``tensor``, which the model has put in the place of one that they shared."""
        assert self.graph is not None
        path, _, leaf = name.rpartition(".")
        owner = self.graph.get_submodule(path)
        for held in (owner._parameters, owner._buffers):
            if leaf in held:
                held[leaf] = tensor  # type: ignore[assignment]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves or casts what is held here, and lets the graph read it."""
        super()._apply(fn, recurse)
        if self.graph is not None:
            for name, tensor in tensors_of(self).items():
                self.set_shared(name, tensor)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "waiting": []}  # a copy of the model is driven by a schedule of its own


def added_state_of(model: Any) -> AddedState | None:
    """What a one-line call added to ``model``; None if there was none."""
    state = model._modules.get(NAME) if isinstance(model, nn.Module) else None
    return state if isinstance(state, AddedState) else None


def wants_whole(model: Any) -> bool:
    """Whether ``model`` was rewritten as a whole, or a schedule waits for that; what parts of it added does not say."""
    state = added_state_of(model)
    return state is not None and (state.graph is not None or state.scheduled)


def attach_state(model: nn.Module) -> AddedState:
    """The `AddedState` of ``model``, registered if it has none yet."""
    state = added_state_of(model)
    if state is None:
        state = AddedState()
        state.training = model.training
        model.add_module(NAME, state)
    return state


@contextlib.contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Runs a block with ``model`` as it was before anything was added to it."""
    state = added_state_of(model)
    if state is not None:
        del model._modules[NAME]
    try:
        yield
    finally:
        if state is not None:
            model.add_module(NAME, state)


def read_of_model(graph: GraphModule, model: nn.Module) -> None:
    """Puts the model's own parameters back where a pass made others of the same memory to freeze some of them."""
    names = parameter_names(graph)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = graph.get_submodule(path) if path in dict(graph.named_modules()) else None
        twin = None if owner is None else owner._parameters.get(leaf)
        if (
            twin is None
            or twin is parameter
            or twin.data_ptr() != parameter.data_ptr()
            or twin.shape != parameter.shape
        ):
            continue
        parameter.requires_grad_(twin.requires_grad)
        for alias in names[id(twin)]:
            at, _, key = alias.rpartition(".")
            graph.get_submodule(at).register_parameter(key, parameter)


def _owner(state: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        if part not in state._modules:
            state.add_module(part, nn.Module())
        state = state._modules[part]  # type: ignore[assignment]
    return state
