"""Configs: Python functions that return a RunConfig. They import `vidit.config` and nothing else."""
