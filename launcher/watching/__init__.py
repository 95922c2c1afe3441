"""Reads the status, logs and job of a run from any machine, and stops it."""
