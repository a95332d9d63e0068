"""The size of a model in a record: FLOPs, parameters, bytes."""

from __future__ import annotations

from torch.fx import GraphModule

from fxsparse.flops import step_flops
from fxsparse.record import Costs
from fxsparse.training_form import training_graph


def costs(gm: GraphModule) -> Costs:
    """The costs of a training-IR graph at the sizes it was traced with; tied parameters count once."""
    forward, step = step_flops(training_graph(gm))
    parameters = list(gm.parameters())
    return Costs(
        forward_flops=forward,
        step_flops=step,
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters),
        buffer_bytes=sum(buffer.nbytes for buffer in gm.buffers()),
        optimizer_bytes=sum(2 * parameter.nbytes for parameter in parameters if parameter.requires_grad),
    )
