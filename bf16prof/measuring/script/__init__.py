"""A user's own training script on real ranks: measured from inside, whoever has started it."""
