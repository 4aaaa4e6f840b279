"""Judging videos: scores that read content back, and the report."""
