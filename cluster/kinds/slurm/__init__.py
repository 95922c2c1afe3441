"""Slurm: jobs that bring their own nodes, start Ray on them, and requeue themselves before their time limit."""
