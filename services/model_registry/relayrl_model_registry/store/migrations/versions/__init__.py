"""One module a migration, numbered; expand first, contract one release later (contracts D5)."""
