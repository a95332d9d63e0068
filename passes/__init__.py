"""Rewrites of the training-IR graph, one file each."""
