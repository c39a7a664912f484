"""What to train and with what: profiles, precision recipes and GPUs, all of them data."""
