"""One file for the model types that share a block: its `FAMILIES` maps their names to what
describes them."""
