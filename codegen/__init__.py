"""Generated Triton kernels: specs, the sources they render to, and how they are launched.

    spec -> source on disk -> Triton function -> launch

A spec (``nm_linear``, ``nm_grad_values``, ``nm_prune``, ``gather``, ``multiplex``, ``sparse_tensor_cores``) is frozen
and renders to one readable file (``source``, ``registry``). ``launch`` takes tensors; ``tiles`` and ``tune`` choose the
shape of the work, ``fusion`` reads epilogues from a graph, ``operators`` puts it all behind the ``fxsparse::`` names.
"""

from fxsparse.codegen.loaded import Kernel, kernels, recording

__all__ = ["Kernel", "kernels", "recording"]
