//! Registry on SQLite.
