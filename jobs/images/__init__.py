"""Images at a URL: how each format is listed once, and how a sample of it is read and decoded.

``folders``, ``tables`` and ``tar`` have the formats, ``indexing`` the index that each of them makes. What the formats
share lies here: URLs, labels and splits, then the dataset that reads, decodes and normalises a sample.
"""
