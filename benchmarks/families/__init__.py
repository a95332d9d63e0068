"""The census: every transformer of the installed transformers, made tiny, under every pass.

    python -m benchmarks.families

| file | what |
|---|---|
| `tiny.py` | configurations made small by the names of their settings, and batches by the signature of ``forward`` |
| `cells.py` | what is tried on a family, and against what |
| `running.py` | families in processes of their own, with limits; results line by line |
| `page.py` | the matrix as ``docs/families.md`` |
"""
