"""The client runtime: actors, local and remote inference, recording, delivery."""
