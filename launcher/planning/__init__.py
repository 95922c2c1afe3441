"""What is decided and checked before a worker starts."""
