"""What keeps compiled code of other options, or of another version of this package, out of torch's compile caches.

The keys of those caches hold the graph and Inductor's configuration, not the Python behind our operators: a changed
autograd formula would go on running as it was first compiled. A custom graph pass that does nothing carries the rest
into the key.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxsparse.errors import OptionError
from fxsparse.options import BackendOptions

# Configuration entries whose uuid is part of the caches' key; the first that the user left empty takes ours.
_SLOTS = (
    "post_grad_custom_post_pass",
    "post_grad_custom_pre_pass",
    "joint_custom_post_pass",
    "joint_custom_pre_pass",
)


class Fingerprint(CustomGraphPass):
    """Changes nothing; its uuid stands for the package's sources and the options.

    Args:
        text: canonical text of the options.
    """

    def __init__(self, text: str):
        self.text = text

    def __call__(self, graph: torch.fx.Graph) -> None:
        pass

    def uuid(self) -> bytes:
        return hashlib.sha256(sources() + self.text.encode()).digest()


@functools.cache
def sources() -> bytes:
    """A hash of every source file of the package, passes and code generation included."""
    import fxsparse
    import fxsparse.codegen
    import fxsparse.passes

    digest = hashlib.sha256(torch.__version__.encode())
    for package in (fxsparse, fxsparse.passes, fxsparse.codegen):
        for root in package.__path__:
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return digest.digest()


def config_patches(options: BackendOptions) -> dict[str, Any]:
    """Inductor's configuration for ``options``, the fingerprint included.

    Raises:
        OptionError: the user occupies every entry a custom graph pass can take.
    """
    from torch._inductor import config

    for slot in _SLOTS:
        if options.inductor.get(slot, getattr(config, slot)) is None:
            return {**options.inductor, slot: Fingerprint(str(options))}
    raise OptionError(f"fxsparse needs one of Inductor's {', '.join(_SLOTS)} to itself; all are taken")
