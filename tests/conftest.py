"""What holds for all tests."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
"""How long an example takes says how busy the machine is; every test has a timeout."""
settings.load_profile("no deadline")
