"""From a model to the training IR."""
