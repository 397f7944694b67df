"""The learning algorithms, one module each."""
