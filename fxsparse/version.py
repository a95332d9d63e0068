"""The version of the package, and what a report of a bug needs beside it."""

__version__ = "0.1.0"


def environment() -> str:
    """``fxsparse 0.1.0, torch 2.13.0, Python 3.11.7``."""
    import platform

    import torch

    return f"fxsparse {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
