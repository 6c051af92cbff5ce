"""The database's schema, one step a file, as alembic runs them. May import: nothing of serving."""
