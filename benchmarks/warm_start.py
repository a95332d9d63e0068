"""Compile time with warm caches, after another process compiled the same model: the backend against Inductor.

    python -m benchmarks.warm_start [--rounds 5]

Every start is a new process with a cache directory filled by an earlier start of the same kind; the kinds take turns.
The time is that of the first forward and backward pass of an OPT of four layers, without imports.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

from benchmarks.timing import environment
from fxsparse.text import table

PROGRAM = """
import sys, time
import torch, transformers
import fxsparse, fxsparse.passes
transformers.logging.set_verbosity_error()
config = transformers.OPTConfig(
    vocab_size=1000, hidden_size=128, word_embed_proj_dim=128, ffn_dim=512, num_hidden_layers=4, num_attention_heads=4,
    layerdrop=0.0, use_cache=False)
torch.manual_seed(0)
model = transformers.OPTForCausalLM(config).train()
ids = torch.randint(2, 1000, (4, 64))
if sys.argv[1] == "2:4 under fxsparse":
    model = fxsparse.rewrite(model, ["nm-masks{pattern=2:4}", "double-prune"], kwargs={"input_ids": ids, "labels": ids})
torch.ones(2).sum()
begin = time.perf_counter()
compiled = torch.compile(model, backend="inductor" if sys.argv[1] == "inductor" else "fxsparse")
compiled(input_ids=ids, labels=ids).loss.backward()
print(time.perf_counter() - begin)
"""
KINDS = ("inductor", "fxsparse", "2:4 under fxsparse")


def start(kind: str, cache: str) -> float:
    """Seconds of one process's first step."""
    environment_ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    run = subprocess.run([sys.executable, "-c", PROGRAM, kind], env=environment_, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cold = {kind: start(kind, os.path.join(folder, str(KINDS.index(kind)))) for kind in KINDS}
        warm: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(args.rounds):
            for kind in KINDS:
                warm[kind].append(start(kind, os.path.join(folder, str(KINDS.index(kind)))))
    rows = [("first step", "cold s", "warm s", "warm / inductor's")]
    for kind in KINDS:
        ratio = statistics.median(mine / its for mine, its in zip(warm[kind], warm["inductor"], strict=True))
        rows.append((kind, f"{cold[kind]:.1f}", f"{statistics.median(warm[kind]):.2f}", f"{ratio:.3f}"))
    print(f"{environment()}, {args.rounds} rounds in turn")
    print("\n".join(table(rows, right=(1, 2, 3))))


if __name__ == "__main__":
    main()
