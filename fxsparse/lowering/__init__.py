"""Which implementation runs each operator of a graph, and putting it in."""
