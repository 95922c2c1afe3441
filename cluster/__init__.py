"""Where a job runs: clusters, processes, storage, collectives, trackers. Knows no job."""
