"""Weight perturbation: the engine, its settings and the named methods."""
