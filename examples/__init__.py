"""Short scripts that train with and without AWP and compare the two."""
