"""The trajectory store: the log of the system, in Postgres or SQLite, behind one interface."""
