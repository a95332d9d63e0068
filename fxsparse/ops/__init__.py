"""The ``fxsparse::`` operators and the N:M format. Importing this package registers every operator, once."""

from fxsparse.ops import gather_linear, multiplex, nm_linear

__all__ = ["gather_linear", "multiplex", "nm_linear"]
