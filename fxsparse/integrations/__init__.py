"""Checkpoints of other libraries: rewritten Hugging Face models are written and read as such."""
