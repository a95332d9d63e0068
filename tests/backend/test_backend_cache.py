"""torch's compile caches never serve code of other options or of another version of the package.

Every case runs in a process of its own on one cache directory. The source of the package is changed in a copy of it,
and only in the gradient of an operator, which leaves the graph and Inductor's configuration as they were.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fxsparse
import fxsparse.codegen
import fxsparse.passes

PROGRAM = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
import fxsparse.passes

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
x = torch.ones(4, 16)
compiled = torch.compile(model, backend="fxsparse", options=json.loads(sys.argv[1]))
y = compiled(x)
y.square().sum().backward()
cache = counters["aot_autograd"]
print(json.dumps({
    "y": float(y.detach().double().sum()), "gradient": float(model[2].weight.grad.double().abs().sum()),
    "hits": cache["autograd_cache_hit"], "misses": cache["autograd_cache_miss"],
    "bypasses": cache["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"],
}))
"""
DOUBLED = ("dense = outer_product(dy, x)\n", "dense = outer_product(dy, x) * 2\n")
"""In the gradient of a masked weight."""
PASSES = {"passes": "nm-masks{pattern=2:4,keep_first=false,keep_head=false}"}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Compiles the same model in a fresh process on one cache; ``package`` is where fxsparse is imported from."""
    package = tmp_path / "package"
    for module, name in (
        (fxsparse, "fxsparse"),
        (fxsparse.passes, "fxsparse/passes"),
        (fxsparse.codegen, "fxsparse/codegen"),
    ):
        shutil.copytree(module.__path__[0], package / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "program.py").write_text("import fxsparse.backend\n" + PROGRAM)

    def start(options: dict[str, Any]) -> dict[str, Any]:
        finder = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]; "
        runner = f"{finder}sys.path.insert(0, {str(package)!r}); exec(open({str(tmp_path / 'program.py')!r}).read())"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", runner, json.dumps(options)],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    start.package = package / "fxsparse"  # type: ignore[attr-defined]
    return start


@pytest.mark.inductor
def test_caches_serve_the_same_and_nothing_else(run: Any) -> None:
    first = run(PASSES)
    assert (first["hits"], first["bypasses"]) == (0, 0)
    again = run(PASSES)
    assert (again["hits"], again["misses"]) == (1, 0)
    assert (again["y"], again["gradient"]) == (first["y"], first["gradient"])

    other = run({**PASSES, "lower": {"nm_linear": "dense"}})  # the graph is the same, the options are not
    assert other["hits"] == 0

    source = run.package / "ops" / "masked_linear.py"
    source.write_text(source.read_text().replace(*DOUBLED))
    doubled = run(PASSES)
    assert doubled["hits"] == 0
    assert doubled["y"] == pytest.approx(first["y"])
    assert doubled["gradient"] == pytest.approx(2 * first["gradient"])
