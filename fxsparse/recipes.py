"""Named pipelines: one name for each published method."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fxsparse.errors import OptionError, nearest
from fxsparse.options import checked, shown
from fxsparse.passes import DistillLayers, Pipeline

RECIPES: dict[str, str] = {
    # SLoPe (arXiv 2405.16325), without and with its lazy branches.
    "slope": "nm-masks{pattern=2:4},double-prune",
    "slope-low-rank": "nm-masks{pattern=2:4},double-prune,low-rank{ratio=0.015625}",
    # Bi-Mask (arXiv 2302.06058): SR-STE's masks, and W^R pruned once more in a searched order of its rows.
    "bi-mask": "nm-masks{pattern=2:4,storage=masked,dynamic=true},double-prune{every=1,permutations=100}",
    # GreenTrainer (arXiv 2309.13192) at half the FLOPs; a Schedule chooses tensors on the batches it observes.
    "greentrainer": "select-tensors{rho=0.5,times=3}",
    # What GreenTrainer compares with as FT-Top2: only the embedding and the head are trained.
    "ft-top2": "select-tensors{embeddings_and_head=true}",
    # SAT (arXiv 2406.01392): half the heads and channels take part in a step. A Schedule chooses them and the rung.
    "sat": "select-neurons{omission=0.5,rungs=4}",
    # LayerCHOP (arXiv 2305.14864): half the layers are dropped at once; train on afterwards.
    "layerchop": "drop-layers{configuration=max-gap,fraction=0.5}",
    # DimCHOP (the same paper): half of the hidden dimensions are masked during training; materialize removes them.
    "dimchop": "drop-dims{fraction=0.5}",
    # DataMUX (arXiv 2202.09318): two inputs share one pass; train it before it is pruned further.
    "datamux": "multiplex{n=2}",
    # PruMUX (Findings of ACL 2023) at once, without distillation: afterwards train and materialize.
    "prumux": "multiplex{n=2},gates{target=0.6}",
}

TAUGHT: dict[str, str] = {
    # CoFi (arXiv 2204.00408): all its gates, its losses, and one projection for all layers that starts as the identity.
    "cofi": "gates{units=[heads,attention,intermediate,ffn,hidden],target=0.6},distill{projection=shared}",
    # PruMUX as published: CoFi on a trained multiplexed model, with that model as the teacher.
    "prumux": "gates{units=[heads,attention,intermediate,ffn,hidden],target=0.6},distill{projection=shared}",
}
"""Recipes with a teacher; `recipe` gives it to their distillation."""


def recipe(name: str, *, teacher: nn.Module | None = None) -> Pipeline:
    """The pipeline called ``name``.

    Args:
        name: one of `RECIPES`, or with a teacher of `TAUGHT`.
        teacher: the model to distil from, traced or not: for ``cofi`` the trained model, for ``prumux`` the trained
            multiplexed one, which is also what the pipeline rewrites::

                mux = fxsparse.rewrite(model, fxsparse.recipe("datamux"), kwargs=batch)  # then train it
                gm = fxsparse.rewrite(mux, fxsparse.recipe("prumux", teacher=mux), copy=True)

    Raises:
        OptionError: there is no such recipe, it needs a teacher, or it has no use for one.
    """
    name = checked("recipe", name, str)
    known = TAUGHT if teacher is not None else RECIPES
    if name not in {**RECIPES, **TAUGHT}:
        raise OptionError(
            f"unknown recipe {shown(name)}; {nearest(name, {**RECIPES, **TAUGHT})}known recipes: "
            f"{', '.join(sorted({**RECIPES, **TAUGHT}))}"
        )
    if name not in known:
        if teacher is None:
            raise OptionError(f"the recipe {name} distils: give it the trained model, recipe({name!r}, teacher=model)")
        raise OptionError(f"the recipe {name} has no teacher; those with one are {', '.join(sorted(TAUGHT))}")
    passes = Pipeline.parse(known[name]).passes
    taught = (replace(item, teacher=teacher) if isinstance(item, DistillLayers) else item for item in passes)
    return Pipeline(taught)
