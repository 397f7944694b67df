"""The registry's tables: the only package of the registry that reaches SQLAlchemy.

`sql.open_store` opens (and migrates) a database; `interface` holds the values and what a store must do.
"""
