"""What a job is: its language, its components and its training loop. Imports ``cluster``, never ``launcher``."""
