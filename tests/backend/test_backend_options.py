"""The options of the backend: what is understood, what is refused and how."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxsparse.backend.backend import compiled_graphs
from fxsparse.backend.options import BackendOptions
from fxsparse.errors import OptionError, RewriteError
from fxsparse.passes.nm.masks import InsertNMMasks
from fxsparse.passes.pipeline import Pipeline


def test_defaults_are_the_bare_call() -> None:
    options = BackendOptions.parse()
    assert options == BackendOptions.parse({}, None) == BackendOptions.parse(None, "default")
    assert options.pipeline is None
    assert options.compiler == "inductor"
    assert options.fallback is True
    assert options.inductor == {}


@pytest.mark.parametrize(
    "passes",
    ["nm-masks{pattern=2:8}", InsertNMMasks("2:8"), [InsertNMMasks("2:8")], ["nm-masks{pattern=2:8}"]],
)
def test_passes_in_any_form_are_the_same_pipeline(passes: object) -> None:
    options = BackendOptions.parse({"passes": passes})
    assert options.pipeline == Pipeline([InsertNMMasks("2:8")])
    assert str(options) == str(BackendOptions.parse({"passes": Pipeline([InsertNMMasks("2:8")])}))


def test_recipe_is_a_name_for_passes() -> None:
    pipeline = BackendOptions.parse({"recipe": "slope"}).pipeline
    assert pipeline is not None
    assert str(pipeline).startswith("nm-masks")


def test_products_are_measured_on_first_use_unless_told_otherwise():
    """The default seconds hold where the option is not given, and 0 stands for every way to say no."""
    assert BackendOptions.parse(None).tune == BackendOptions.parse({"fallback": False}).tune == 30.0
    assert BackendOptions.parse({"tune": 5}).tune == 5.0
    assert [BackendOptions.parse({"tune": off}).tune for off in (0, None, False)] == [0.0] * 3


def test_mode_and_inductor_options_are_expanded() -> None:
    assert BackendOptions.parse(None, "max-autotune-no-cudagraphs").inductor["max_autotune"] is True
    assert BackendOptions.parse({"triton.cudagraphs": False, "max-autotune": True}).inductor == {
        "triton.cudagraphs": False,
        "max_autotune": True,
    }


def test_text_tells_options_apart() -> None:
    given = [
        {},
        {"passes": "nm-masks"},
        {"lower": {"nm_linear": "dense"}},
        {"compiler": "eager"},
        {"max_autotune": True},
    ]
    assert len({str(BackendOptions.parse(options)) for options in given}) == len(given)
    assert str(BackendOptions.parse({"lower": {"nm_linear": "auto"}})) == str(BackendOptions.parse())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fallbak": False}, "did you mean 'fallback'"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
        ({"max_autotune": "yes"}, "max_autotune"),
        ({"freezing": True}, "freezing"),
        ({"lower": {"nm_linea": "dense"}}, "did you mean 'nm_linear'"),
        ({"lower": {"nm_linear": "fast"}}, "'sparse_wgmma', 'cusparselt'"),
        ({"lower": "dense"}, "maps operators to implementations"),
        ({"compiler": "tvm"}, "aot_eager"),
        ({"fallback": 1}, "fallback=1"),
        ({"fallback": "no"}, "fallback='no' must be true or false"),
        ({"tune": float("nan")}, "tune=nan must be a number of at least 0"),
        ({"tune": "long"}, "tune='long' must be a number"),
        ({"lower": {3: "dense"}}, "unknown operator 3"),
        ({5: "dense"}, "options.* must be a mapping"),
        ({"passes": 3}, "not int"),
        ({"passes": "nm-masks{decay=nan}"}, "decay=nan must be a number of at least 0"),
        ({"passes": "nm-masks{keep_first=x}"}, "keep_first='x' must be true or false"),
        ({"recipe": 3}, "recipe=3 must be a text"),
        ({"passes": "unheard-of"}, "unknown pass 'unheard-of'"),
        ({"recipe": "slop"}, "did you mean 'slope'"),
        ({"recipe": "slope", "passes": "nm-masks"}, "not both"),
    ],
)
def test_refused_options_say_what_to_do(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BackendOptions.parse(options)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(OptionError, match="fastest"):
        BackendOptions.parse(None, "fastest")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unheard_of": 1}, "unheard_of"),
        ({"passes": "nm-masks{decay=nan}"}, "nm-masks: decay=nan"),
        ({"passes": "low-rank{rank=inf}"}, "low-rank: rank=inf"),
        ({"passes": ["["], "fallback": True}, "expected a pass name"),
        ({"tune": "x", "fallback": True}, "tune='x'"),
    ],
)
def test_errors_reach_the_caller_unwrapped_even_when_dynamo_suppresses_errors(
    options: dict[str, object], message: str
) -> None:
    x = torch.randn(2, 8)
    compiled = torch.compile(nn.Linear(8, 8), backend="fxsparse", options=options)
    with torch._dynamo.config.patch(suppress_errors=True):
        for _ in range(2):
            with pytest.raises(OptionError, match=message):
                compiled(x)


def test_a_pass_that_refuses_reaches_the_caller_and_can_be_retried() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 8)
    options = {"passes": 'nm-masks{pattern={"*.missing":2:4}}', "compiler": "eager"}
    with pytest.raises(RewriteError, match=r"'\*\.missing' matches no linear"):
        torch.compile(model, backend="fxsparse", options=options)(x)
    compiled = torch.compile(model, backend="fxsparse", options={"compiler": "eager"})
    torch.testing.assert_close(compiled(x), model(x))


def test_equal_options_do_not_recompile() -> None:
    class Net(nn.Module):
        """No Sequential, whose forward runs over what passes register with it too, and is compiled once more then."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model, x = Net(), torch.randn(4, 32)
    compiled = [
        torch.compile(
            model,
            backend="fxsparse",
            options={"passes": [InsertNMMasks("2:4", keep_first=False, keep_head=False)], "compiler": "eager"},
        )
        for _ in range(3)
    ]
    for each in compiled:
        each(x)
    assert [len(compiled_graphs(each)) for each in compiled] == [1, 1, 1]
