"""A 3D U-Net with factorised space and time: the denoiser of the years before transformers, as a baseline."""
