"""Image folders: a folder per class, on this machine or a store."""
