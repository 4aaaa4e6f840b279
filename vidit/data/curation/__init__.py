"""Curation: scores of every clip, computed once and stored beside the shards, and what they decide later."""
