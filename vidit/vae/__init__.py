"""The causal 3D VAE: layers, encoder and decoder, weights on disk."""
