"""Drawing videos from a trained run."""
