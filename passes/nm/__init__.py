"""N:M masks: SLoPe, SR-STE, Wanda, double pruning and low-rank branches."""
