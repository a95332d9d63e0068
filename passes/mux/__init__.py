"""Data multiplexing: several inputs through one forward pass (DataMUX, MUX-PLM)."""
