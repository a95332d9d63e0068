"""Generated kernels, Triton on a GPU and C++ on a CPU: from a spec to a source on disk, a launch and an operator.

making       spec      frozen description of a kernel, its tile and its arguments; ``render()`` gives the source
             template  pieces of source that the kernels share; ``epilogue`` the steps after a product
             mma_sp    the instruction of sparse tensor cores and its layouts; ``wgmma_sp`` Hopper's; ``metadata``
                       packs their words
             kernels/  one file a kernel: its spec, its template, its default tiles and its launch
running      source    generated files on disk; ``loaded`` the kernels of this process and their launches
             launching helpers of the launches; ``split`` products whose depth is computed in parts
             replay    launches again, with everything known but the tensors' addresses
             tiles     default tiles; ``autotune`` measures others and ``store`` keeps every measured result
             aot       compiling for a GPU that need not be there; ``sass`` reads the machine code
cpu          C++ kernels: instruction sets, specs and sources, building, and calls that compiled graphs hold
operators    operators puts launches behind the ``fxsparse::`` operators
             fused_ops operators with an epilogue, or on sparse tensor cores
"""
