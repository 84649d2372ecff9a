"""Runs that are killed, and runs that last long."""
