"""Weight perturbation: one engine, its choices, and the named methods."""
