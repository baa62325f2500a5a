"""Trained adapter to files that are served: merged weights, GGUF, quantised GGUF, companions."""
