"""The table of operators: what a record says agrees with what its operator does."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxsparse import ops
from fxsparse.lowering.candidates import random_operands
from fxsparse.ops.flops import Operand
from fxsparse.ops.operator import OPERATORS, Operator, operator_of
from tests.support.tuned import TUNED


def test_every_operator_of_the_package_is_in_the_table_once() -> None:
    modules = [importlib.import_module(f"fxsparse.ops.{item.name}") for item in pkgutil.iter_modules(ops.__path__)]
    defined = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Operator)}
    assert {operator.name: operator for operator in defined.values()} == OPERATORS
    for name, operator in OPERATORS.items():
        assert operator_of(operator.overload) is operator_of(operator.overload.overloadpacket) is operator
        assert operator.overload is getattr(torch.ops.fxsparse, name).default
    assert operator_of(torch.ops.aten.mm.default) is None


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_what_a_record_names_is_there(operator: Operator) -> None:
    assert set(operator.gradients) <= OPERATORS.keys()
    assert all(OPERATORS[name].backward is None for name in operator.gradients)
    assert (operator.operands is None) == (operator.sizes is None) == (operator.name not in TUNED)
    assert "dense" not in operator.implementations or operator.dense is not None


@pytest.mark.parametrize("op", [name for name in TUNED if OPERATORS[name].gradients and "low_rank" not in name])
def test_flops_of_gradients_are_those_of_their_operators(op: str) -> None:
    """A branch beside a product adds to both, which its own tests count."""
    args = random_operands(TUNED[op], "cpu").args
    operands = [Operand(tuple(arg.shape), arg.dtype) if isinstance(arg, Tensor) else arg for arg in args]
    y = OPERATORS[op](*args)
    (product,) = OPERATORS[op].flops(Operand(tuple(y.shape), y.dtype), *operands)
    for leaf, operand in zip(args[:2], operands[:2], strict=True):
        leaf.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(OPERATORS[op](*args).sum(), leaf)
        leaf.requires_grad_(False)
        assert counter.get_total_flops() == product.flops + product.gradients[operand]
