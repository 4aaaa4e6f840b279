"""The video DiT: structure only. It knows nothing of layouts, losses or data."""
