"""Named pipelines: each of the published methods in one word."""

from __future__ import annotations

from fxsparse.errors import OptionError, nearest
from fxsparse.passes import Pipeline

RECIPES: dict[str, str] = {
    # SLoPe (arXiv 2405.16325); without branches it also serves the one-line call, whose optimizer knows of none.
    "slope": "nm-masks{pattern=2:4},double-prune",
    "slope-low-rank": "nm-masks{pattern=2:4},double-prune,low-rank{ratio=0.015625}",
    # GreenTrainer (arXiv 2309.13192) at half the FLOPs; a Schedule chooses by the batches it observes.
    "greentrainer": "select-tensors{rho=0.5,times=3}",
    # SAT (arXiv 2406.01392): half the heads and channels take part in a step; a Schedule chooses and climbs the ladder.
    "sat": "select-neurons{omission=0.5,rungs=4}",
    # LayerCHOP (arXiv 2305.14864): half the layers at once, then train on.
    "layerchop": "drop-layers{configuration=max-gap,fraction=0.5}",
    # DimCHOP (the same): half of the hidden dimensions while training goes on; materialize takes them out.
    "dimchop": "drop-dims{fraction=0.5}",
    # PruMUX (Findings of ACL 2023): then train, distil from the multiplexed model, and materialize.
    "prumux": "multiplex{n=2},gates{target=0.6}",
}


def recipe(name: str) -> Pipeline:
    """The pipeline called ``name``.

    Raises:
        OptionError: there is no such recipe.
    """
    if name not in RECIPES:
        raise OptionError(
            f"unknown recipe {name!r}; {nearest(name, RECIPES)}known recipes: {', '.join(sorted(RECIPES))}"
        )
    return Pipeline.parse(RECIPES[name])
