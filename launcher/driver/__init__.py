"""The driver: who works, what failures come to, what is written down."""
