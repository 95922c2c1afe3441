"""Experiment trackers: none, in memory, or Weights & Biases."""
