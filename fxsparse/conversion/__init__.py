"""From rewritten graphs back to modules of the model's class.

`convert` makes them, of parts: `weights` in another form, the `notes` of a graph, fewer layers (`depth`), smaller sizes
(`resizing`, `width`, `heads`), the `folders` that they are saved to, and a `comparison` with the graph.
"""
