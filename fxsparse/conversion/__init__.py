"""From rewritten graphs back to modules of the model's class: `convert`, its parts `weights` and `notes`."""
