"""Many configs and seeds: jobs, the processes that run them, their records."""
