"""What Alembic runs for a migration: on the connection, and in the transaction, that ``upgrade`` hands it."""

from alembic import context

from registry.metadata.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
