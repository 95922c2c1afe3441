"""Tar shards in WebDataset's layout."""
