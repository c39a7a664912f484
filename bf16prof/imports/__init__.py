"""What others logged, read into findings, and findings into the record of a run: one file per
format."""
