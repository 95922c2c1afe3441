"""A run as it is seen from anywhere: its status, its logs, its job; and stopping it."""
