"""The ``fxsparse::`` operators and the N:M format.

Importing this package, or any module of it, registers every operator once: each file here is imported.
`fxsparse.ops.operator.OPERATORS` then holds them by name.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
