"""The command ``fxsparse``: looking at passes, rewriting model folders, and measuring, from a terminal.

| module | what |
|---|---|
| `app` | the group of commands, errors and exit codes |
| `options` | arguments and options that commands share |
| `output` | what commands print, and writing files whole or not at all |
| `models` | a model and an example of its inputs, from a folder, a configuration or a function |
| `catalogue` | ``passes`` |
| `rewriting` | ``explain``, ``rewrite``, ``report`` |
| `prune` | ``prune`` |
| `measuring` | ``tune`` and ``kernels`` |
| `bench` | ``bench`` |
| `machine` | ``env`` and ``completion`` |

It needs click and rich: ``pip install fxsparse[cli]``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        from fxsparse.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"click", "rich"}:
            raise
        print(f"fxsparse: the command line needs {error.name}: pip install 'fxsparse[cli]'", file=sys.stderr)
        return 1
    return run(sys.argv[1:] if arguments is None else arguments)
