"""What two services or more share: contracts and plumbing, never business logic."""
