//! Message store: write-ahead log, memtable, segments.
