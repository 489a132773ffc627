"""Read quantised checkpoints as plain tensors: which tensors belong together, and the arithmetic of each format."""
