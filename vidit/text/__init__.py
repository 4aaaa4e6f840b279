"""Text encoders behind one interface."""
