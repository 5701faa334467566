#!/usr/bin/env bash
# Changes a second of the registry in PostgreSQL, each durable and in the audit trail, against bare INSERT with a commit each by
# as many connections in the same run: by one writer, and by 64 at once. The changes are those of commands: a command takes three.
source "$(dirname "$0")/lib.sh"
machine
start_postgres
DATABASE="host=$PGHOST port=$PGPORT user=postgres dbname=postgres" \
    cargo run --quiet --release --package fieldline-postgres --example registry_writes
