"""The version of the package, and what a report of a bug needs beside it."""

__version__ = "0.1.0"


def how_to_report(details: str = "") -> str:
    """The request to report a bug of fxsparse, with the versions and what else a report needs."""
    import platform

    import torch

    versions = f"fxsparse {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return (
        "This is a bug in fxsparse, not in your model or your call. Nothing was changed. Please report it with this "
        f"message and the traceback above it: {', '.join(part for part in (versions, details) if part)}"
    )
