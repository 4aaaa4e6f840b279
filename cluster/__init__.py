"""Site and hardware files, read as data."""
