"""From names in a description to objects: loss, optimizer, schedule, metrics."""
