"""Plain values, a file a run."""
