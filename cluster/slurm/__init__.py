"""SLURM: the template of our jobs, and a throwaway SLURM on one machine."""
