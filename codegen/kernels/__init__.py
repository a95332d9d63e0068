"""The Triton kernels, each with its launch in the file of its name. Importing the package imports them all.

A file holds, from top to bottom: the formula, the default tiles, the spec and the template of its source, and the
launch, which takes tensors and returns a tensor. ``kernel_of`` puts a launch behind its ``fxsparse::`` operator, so a
new operator's kernel is one new file here.

Each launch allocates its result, runs on the current stream and returns without waiting, so it can be captured in a
CUDA graph. Leading dimensions of an input are flattened to rows and restored. A dtype or pattern without a kernel
raises OptionError; ``launching.unsupported`` says so beforehand.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
