"""Forward processes, training targets, timestep densities, samplers and guidance.

A model is only ever a callable here: nothing in this package knows a layer, a rank or a file.
"""
