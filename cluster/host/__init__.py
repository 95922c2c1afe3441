"""What an operating system tells of itself: processes, memory, interfaces; and folders that go with a process."""
