"""Readers of rollout dumps, one file a format."""
