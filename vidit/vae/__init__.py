"""The causal 3D VAE: layers, encoder and decoder, what it is trained with, weights on disk."""
