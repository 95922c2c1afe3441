"""What the operating system says about processes, memory and network interfaces; and folders owned by a process."""
