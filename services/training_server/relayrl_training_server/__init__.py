"""The training server: supervisor, ingest and learners."""
