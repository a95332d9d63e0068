"""Named pipelines: one name for each published method."""

from __future__ import annotations

from fxsparse.errors import OptionError, nearest
from fxsparse.passes import Pipeline

RECIPES: dict[str, str] = {
    # SLoPe (arXiv 2405.16325). Without branches it also works in the one-line call, whose optimizer holds no branches.
    "slope": "nm-masks{pattern=2:4},double-prune",
    "slope-low-rank": "nm-masks{pattern=2:4},double-prune,low-rank{ratio=0.015625}",
    # Bi-Mask (arXiv 2302.06058): SR-STE's masks, and W^R pruned once more in a searched order of its rows.
    "bi-mask": "nm-masks{pattern=2:4,storage=masked,dynamic=true},double-prune{every=1,permutations=100}",
    # GreenTrainer (arXiv 2309.13192) at half the FLOPs; a Schedule chooses tensors on the batches it observes.
    "greentrainer": "select-tensors{rho=0.5,times=3}",
    # SAT (arXiv 2406.01392): half the heads and channels take part in a step. A Schedule chooses them and the rung.
    "sat": "select-neurons{omission=0.5,rungs=4}",
    # LayerCHOP (arXiv 2305.14864): half the layers are dropped at once; train on afterwards.
    "layerchop": "drop-layers{configuration=max-gap,fraction=0.5}",
    # DimCHOP (the same paper): half of the hidden dimensions are masked during training; materialize removes them.
    "dimchop": "drop-dims{fraction=0.5}",
    # PruMUX (Findings of ACL 2023): afterwards train, distil from the multiplexed model, and materialize.
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
