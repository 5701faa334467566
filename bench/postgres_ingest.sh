#!/usr/bin/env bash
# Messages a second into the history in PostgreSQL, durable and acknowledged, against bare COPY of the same rows
# by two connections in the same run. The claim: 60,000 a second, or half of bare COPY.
source "$(dirname "$0")/lib.sh"
machine
start_postgres
DATABASE="host=$PGHOST port=$PGPORT user=postgres dbname=postgres" \
    cargo run --quiet --release --package fieldline-postgres --example postgres_ingest
