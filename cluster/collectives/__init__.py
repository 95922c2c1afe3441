"""What workers tell each other in a step: gradients, summed along one tree."""
