"""Modules whose weights are held in another form: the products, and finding them in a tree of modules.

| module | what |
|---|---|
| `held` | what all of them share: the form of a weight, its tensors, its dense values |
| `linears` | linears in the places of ``nn.Linear`` |
| `conv1d` | linears in the places of transformers' ``Conv1D``; imports transformers |
| `reading` | modules whose own code reads a weight that is held in another form, such as ``nn.MultiheadAttention`` |
| `dense_view` | the read-only tensor that readers of ``weight`` get |
| `sites` | the held weights of a tree of modules, by their paths |
"""
