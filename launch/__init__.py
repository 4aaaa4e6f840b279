"""Starting jobs: renders text, then submits it. No torch here."""

BACKENDS = {"local": "launch.process", "slurm": "launch.slurm", "ray": "launch.ray_backend"}
"""The modules that hold a class `Backend`, by the name of the back-end."""
