"""A store: a directory at an fsspec URL, made reliable enough to hold a run."""
