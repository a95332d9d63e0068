"""SAT: a choice of heads and channels to compute in each training step."""
