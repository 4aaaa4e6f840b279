"""Judging videos: scores that read content back, how near a reconstruction is, and the report."""
