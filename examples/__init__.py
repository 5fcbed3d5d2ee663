"""Short scripts that train with and without AWP; each compares the two."""
