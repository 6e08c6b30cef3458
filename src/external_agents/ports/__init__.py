"""What the application needs from outside, as Protocols; each docstring is what its adapters are tested by."""
