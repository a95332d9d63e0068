"""What a graph costs: FLOPs, bytes, the backprop graph, and the exact selection of tensors within a budget."""
