"""A run handed over to a cluster."""
