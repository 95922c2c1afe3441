"""Decides and checks everything before a worker starts."""
