"""A directory at an fsspec URL, and what makes it fit to hold a run."""
