"""Training of the tiny model: text to windows, windows to weights, weights to a GGUF file."""
