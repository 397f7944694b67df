"""The registry's tables and blobs."""
