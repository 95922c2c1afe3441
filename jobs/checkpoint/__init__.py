"""What a checkpoint holds, how it is saved, and how weights of another run are read."""
