"""The training IR: a graph module, reading it and editing it. Pass writers say ``from fxsparse import graph as fx``.

The training IR is the pre-dispatch ATen graph of ``torch.export``: parameters and buffers are ``get_attr`` nodes
named by their fully qualified name, ``node.meta["val"]`` is a fake tensor with symbolic sizes, and
``node.meta["nn_module_stack"]`` says which module of the model a node came from.

| module | what |
|---|---|
| `traits` | what operators do to their tensors |
| `linears` | products with a parameter |
| `experts` | products of rows with the matrices of their experts |
| `state` | parameters and buffers |
| `values` | fake values and module paths of nodes |
| `edit` | inserting, replacing and removing nodes |
| `function` | functions as graphs, for `edit` to insert |
| `record` | what passes did to a graph module |
| `derived_buffers` | buffers that are computed from parameters |
| `live` | what passes know about their sites, kept true by later edits |
| `wrapped` | the graph module inside what a training loop wraps around it |
| `training_form` | the graph that runs in training where it is another one |
| `trainable` | which parameters are trained |
| `graph_state` | flags in the `state_dict` that say in which state of training the graph is |
| `dynamo` | Dynamo's graphs, and bringing them into this form and back |
| `runtime_state` | tensors that reach a compiled graph at run time, found by a weight's identity |
"""

from fxsparse.graph.edit import (
    eliminate_dead_code,
    insert_attribute,
    insert_buffer,
    insert_call,
    insert_function,
    insert_module,
    refresh,
    replace,
    replace_with_call,
    transform,
)
from fxsparse.graph.experts import ExpertLinear, expert_linears, replace_product, weight_site
from fxsparse.graph.linears import (
    FROZEN,
    Linear,
    applies_parameter,
    depends_on_inputs,
    first_linears,
    head_linears,
    input_embeddings,
    is_embedding,
    is_transpose,
    linears,
    read_of,
)
from fxsparse.graph.state import (
    adopt,
    attribute,
    copy_sharing_state,
    copy_tree,
    delete,
    delete_state,
    meta_of,
    module_path,
    parameter_names,
    put_first,
    reads,
    replace_parameter,
    set_buffer,
    set_parameter,
    shell,
    state_read,
    tensors_of,
)
from fxsparse.graph.values import arguments, example_of, fake_mode, stack_path, value
from fxsparse.graph.wrapped import graph_module_of, module_form_of, rewritten_of, unwrapped

__all__ = [
    "FROZEN",
    "ExpertLinear",
    "Linear",
    "adopt",
    "applies_parameter",
    "arguments",
    "attribute",
    "copy_sharing_state",
    "copy_tree",
    "delete",
    "delete_state",
    "depends_on_inputs",
    "eliminate_dead_code",
    "example_of",
    "expert_linears",
    "fake_mode",
    "first_linears",
    "graph_module_of",
    "head_linears",
    "input_embeddings",
    "insert_attribute",
    "insert_buffer",
    "insert_call",
    "insert_function",
    "insert_module",
    "is_embedding",
    "is_transpose",
    "linears",
    "meta_of",
    "module_form_of",
    "module_path",
    "parameter_names",
    "put_first",
    "read_of",
    "reads",
    "refresh",
    "replace",
    "replace_parameter",
    "replace_product",
    "replace_with_call",
    "rewritten_of",
    "set_buffer",
    "set_parameter",
    "shell",
    "stack_path",
    "state_read",
    "tensors_of",
    "transform",
    "unwrapped",
    "value",
    "weight_site",
]
