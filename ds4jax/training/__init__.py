"""Training of the tiny model: from text to windows, from windows to weights, from weights to a GGUF file."""
