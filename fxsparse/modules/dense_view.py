"""The dense values of a weight that is held in another form, for code that reads ``module.weight``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxsparse.errors import RewriteError

_ATTRIBUTES: tuple[Any, ...] = (Tensor.data, Tensor.requires_grad, Tensor.grad)


class DenseView(Tensor):
    """A weight computed for its reader, which refuses to be written to: a write would be lost.

    Whatever is computed from it is an ordinary tensor, and gradients reach the parameters that hold the weight.
    """

    site: str
    _is_hf_initialized = True
    """Transformers initialises what it does not find in a file, and leaves a tensor that says so alone."""

    @classmethod
    def of(cls, weight: Tensor, site: str) -> Tensor:
        """``weight`` as a view that names ``site`` in its refusal."""
        view = weight.as_subclass(cls)
        view.site = site
        return view

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if args and isinstance(args[0], cls) and _writes(func):
            raise RewriteError(
                "its weight is held in another form, and this is a read-only view of it: a write would be lost. "
                "To merge an adapter, first make the weights dense: "
                "model.load_state_dict(fxsparse.dense_state_dict(module)) on the original model, and merge there",
                site=args[0].site,
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func == Tensor.data.__get__ and isinstance(args[0], cls):  # type: ignore[attr-defined]
                return cls.of(result.as_subclass(Tensor), args[0].site)  # ``weight.data += x`` is a write as well
            return result.as_subclass(Tensor) if isinstance(result, cls) else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return any(func == attribute.__set__ for attribute in _ATTRIBUTES)
    in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "_is_view")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name in _AUGMENTED)


_AUGMENTED = frozenset(
    f"__i{name}__"
    for name in (
        *("add", "sub", "mul", "matmul", "truediv", "floordiv", "div", "mod", "pow"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
)
