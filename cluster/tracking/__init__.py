"""One tracker per run: none, memory, or Weights & Biases."""
