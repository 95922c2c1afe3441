"""One worker is two processes: an agent, and the training process that it forks and watches."""
