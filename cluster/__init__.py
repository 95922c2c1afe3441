"""Where a job runs: Ray, storage, collectives, trackers. Knows no job."""
