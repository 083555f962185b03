"""Evaluates models: scores, log probabilities, traces, the lossless check, and recorded continuations."""
