"""Collectives between workers: gradients are summed along one fixed tree."""
