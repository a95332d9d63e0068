"""fxsparse: rewrite PyTorch transformers to sparse, smaller or multiplexed ones, and compile them."""
