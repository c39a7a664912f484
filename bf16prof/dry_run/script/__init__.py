"""A user's own script in the dry run's world: what it finds there, what is made up for it, and the
record of its steps."""
