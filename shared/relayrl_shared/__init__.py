"""What two services or more share: contracts and plumbing, never business logic."""

__version__ = "0.1.0"
