"""Images at a URL: how each format is listed once, and how a sample of it is read and decoded."""
