"""A training script of the user's own, run unmodified: what its command line says, how it is run,
and how its engines are watched."""
