"""The content and file layout of a checkpoint, saving it in the background, and warm starts."""
