"""Seconds, tokens per second and bytes."""
