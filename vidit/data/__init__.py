"""Clips: reading, writing, packing, order, batches. Takes rank and world as integers, never a process group."""
