"""Branches of a model's Python on masks and tokens: taken as on the example, and checked on every call.

    if (mask == 0).any():          on the example: False          _assert_async(~(mask == 0).any(), "...")
        x = fill(x, mask)                                         and nothing of the branch

A graph has no values, so it holds one side of a branch. Where the value follows from integers and sizes alone, as of an
attention mask (Longformer asks whether any token is global), inputs of one kind answer alike: the model runs once on
the example and notes each answer; capture gets these answers, and the graph asserts them. What follows from numbers
that no two batches share, random ones, activations and weights, stays undecided, and so does a line that gets both
answers from one module.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fxsparse.tracing.export import Inputs, innermost_module, left_as_it_was, of_the_model, place, tensors

Question = tuple[int, str]
"""The module that asks, by its identity, and the line of its code."""
Answers = Mapping[Question, bool]


class _Recording(TorchFunctionMode):
    """Notes the answers; ``varying`` tensors follow from floating-point inputs, weights or random numbers."""

    def __init__(self, model: nn.Module, inputs: Inputs):
        super().__init__()
        self.model = model
        self.answers: dict[Question, set[bool | None]] = {}
        self.varying = WeakIdKeyDictionary()
        self._vary(tensor for tensor in (*model.parameters(), *model.buffers(), *tensors(inputs)) if _is_float(tensor))

    def _vary(self, found: Any) -> None:
        self.varying.update((tensor, None) for tensor in found)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        varies = any(tensor in self.varying for tensor in tensors((args, kwargs)))
        varies = varies or not torch.equal(before, torch.get_rng_state())
        if _asks(func, args):
            answer = None if varies else bool(result)
            self.answers.setdefault(_question(self.model)[0], set()).add(answer)
        elif varies:
            self._vary(tensors((result, args[:1] if _writes(func) else ())))
        return result


class _Answering(TorchFunctionMode):
    """Gives the answers of the example while a model is captured, and lets the graph assert them."""

    def __init__(self, model: nn.Module, answers: Answers, given: dict[str, bool]):
        super().__init__()
        self.model, self.answers, self.given = model, answers, given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _asks(func, args):
            question, where = _question(self.model)
            answer = self.answers.get(question)
            if answer is not None:
                condition = args[0].reshape(()) if args[0].dtype == torch.bool else args[0].reshape(()) != 0
                torch._assert_async(condition if answer else condition.logical_not(), _told(where, answer))
                self.given[where] = answer
                return answer
        return func(*args, **(kwargs or {}))


def answers_on(model: nn.Module, inputs: Inputs) -> Answers:
    """What a model's Python learns of tensors on an example, in its mode, where one answer serves all calls."""
    with left_as_it_was(model), torch.no_grad(), _Recording(model, inputs) as recording:
        model(*inputs[0], **inputs[1])
    return {
        question: answer
        for question, (answer, *others) in ((question, list(found)) for question, found in recording.answers.items())
        if answer is not None and not others
    }


def answering(model: nn.Module, answers: Answers, given: dict[str, bool]) -> TorchFunctionMode:
    """Within it a capture of ``model`` gets ``answers``; ``given`` takes those that it asked for, by their place."""
    return _Answering(model, answers, given)


def note(where: str, answer: bool) -> str:
    """A decision, for the notes of a trace."""
    return f"a branch was taken as on the example ({answer}), and every call checks that: {where}"


def _told(where: str, answer: bool) -> str:
    return (
        f"the graph holds one side of a branch on data, which was {answer} on the example that was traced and is "
        f"{not answer} now: trace the model with an example such as this input ({where})"
    )


def _asks(func: Any, args: Any) -> bool:
    if func is Tensor.item:
        return bool(args[0].dtype == torch.bool)
    return func in (Tensor.__bool__, torch.is_nonzero) and isinstance(args[0], Tensor)


def _writes(func: Any) -> bool:
    name = str(getattr(func, "__name__", ""))
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _question(model: nn.Module) -> tuple[Question, str]:
    """Who asks now, and where that is."""
    frames = of_the_model(reversed(list(traceback.walk_stack(sys._getframe()))))
    where = place(*frames[-1]) if frames else ""
    return (id(innermost_module(frames, model)), where), where
