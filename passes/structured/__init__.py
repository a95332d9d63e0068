"""Structured pruning: CoFi's gates, DimCHOP's masks, and cutting what they closed."""
