"""Shows runs to people: progress, tables, plots."""
