"""Kernels for CPUs in C++: specs, the sources they render to, how they are built, loaded and called."""
