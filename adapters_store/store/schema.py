"""The tables of a store, and how older ones become these. A store's version is how many of the steps it has taken."""

import sqlite3
from collections.abc import Sequence

from adapters_store.errors import StoreUnfit

MIGRATIONS: Sequence[str] = (
    """
    -- what the store belongs to, as key and value
    CREATE TABLE identity (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    -- what a name means: a Record as MessagePack
    CREATE TABLE names (name TEXT PRIMARY KEY, record BLOB NOT NULL);
    -- weights: their summary (Weights as MessagePack), and what it takes to serve them
    CREATE TABLE revisions (revision TEXT PRIMARY KEY, weights BLOB NOT NULL, package BLOB NOT NULL,
                            description BLOB NOT NULL);
    -- the files of each, all of them in blobs/
    CREATE TABLE files (revision TEXT NOT NULL REFERENCES revisions ON DELETE CASCADE, file TEXT NOT NULL,
                        sha256 TEXT NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (revision, file)) WITHOUT ROWID;
    CREATE INDEX files_by_hash ON files (sha256);
    -- an Alias as MessagePack
    CREATE TABLE aliases (name TEXT PRIMARY KEY, alias BLOB NOT NULL);
    -- who did what; rows are added and never touched again
    CREATE TABLE log (id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL,
                      action TEXT NOT NULL, name TEXT NOT NULL, revision TEXT, details TEXT);
    CREATE TRIGGER log_keeps_rows BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
    CREATE TRIGGER log_keeps_words BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
    """,
)


def migrate(connection: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Take the steps that are missing, each whole or not at all. Raises StoreUnfit for a store of a newer version."""
    version = check_version(connection, migrations)
    for number, step in enumerate(migrations[version:], start=version + 1):
        # executescript commits what is open first; BEGIN within it makes the step one transaction
        try:
            connection.executescript(f"BEGIN IMMEDIATE; {step} PRAGMA user_version = {number}; COMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def check_version(connection: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> int:
    """The store's version. Raises StoreUnfit for that of a newer Heddle."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(migrations):
        raise StoreUnfit(
            f"the store has version {version}, and this Heddle knows versions up to {len(migrations)}; use the newer "
            "Heddle that wrote it, or another store"
        )
    return version
