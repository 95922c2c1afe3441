"""What a job is: its language, its parts, its loop. Imports nothing but the services of ``cluster``."""
