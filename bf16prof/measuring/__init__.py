"""The real thing: ranks started, watched and ended; probes; the records of what they saw."""
