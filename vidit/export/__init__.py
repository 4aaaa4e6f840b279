"""Weights for use outside training: safetensors with a config beside them."""
