"""Data parallelism as one worker sees it: its shards, collectives with the other workers, reports of steps."""
