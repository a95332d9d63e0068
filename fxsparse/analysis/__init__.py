"""Read-only analyses of a graph: blocks, structures, residual streams, units, activation norms."""
