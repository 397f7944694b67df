"""The inference server: batched remote actions."""
