#!/usr/bin/env bash
# (c) Bytes of a message on disk, sealed, against PostgreSQL rows of the same messages: at most 1/8.
#
# The peer is what people use for such data: one row a message, its values in jsonb, and an index on device and
# time. A typed table with a column for each value is measured beside it.
source "$(dirname "$0")/lib.sh"
machine

cargo build --release --locked --quiet --package fieldline-mdb --example mdb_bench
mkdir "$WORK/mdb"
ours=$("$TARGET/release/examples/mdb_bench" --dir "$WORK/mdb" --messages "${MESSAGES:-200000}" --export-csv "$WORK/messages.csv" | grep -E '^\{.*"bytes"' | tail -1)
messages=$(python3 -c 'import json,sys; print(json.loads(sys.argv[1])["messages"])' "$ours")
bytes=$(python3 -c 'import json,sys; print(json.loads(sys.argv[1])["bytes"])' "$ours")

start_postgres
python3 - "$WORK/messages.csv" "$WORK/jsonb.csv" >"$WORK/columns" <<'PY'
import csv, json, sys
with open(sys.argv[1]) as source, open(sys.argv[2], "w", newline="") as target:
    rows, out = csv.DictReader(source), csv.writer(target)
    values = [name for name in rows.fieldnames if name not in ("device", "timestamp_us", "received_us")]
    for row in rows:
        message = {name: json.loads(row[name]) for name in values if row[name]}
        out.writerow([row["device"], row["timestamp_us"], row["received_us"], json.dumps(message)])
kinds = {"engine.ignition": "bool"}
print(", ".join(f'"{name}" {kinds.get(name, "float8")}' for name in values))
PY
psql -q -v ON_ERROR_STOP=1 <<SQL
CREATE TABLE jsonb_rows (device uuid, ts int8, received int8, message jsonb);
CREATE TABLE typed_rows (device uuid, ts int8, received int8, $(cat "$WORK/columns"));
\\copy jsonb_rows FROM '$WORK/jsonb.csv' CSV
\\copy typed_rows FROM '$WORK/messages.csv' CSV HEADER
CREATE INDEX ON jsonb_rows (device, ts);
CREATE INDEX ON typed_rows (device, ts);
VACUUM ANALYZE;
SQL
size() { psql -At -c "SELECT pg_total_relation_size('$1')"; }
python3 - "$messages" "$bytes" "$(size jsonb_rows)" "$(size typed_rows)" <<'PY'
import sys
messages, ours, jsonb, typed = map(int, sys.argv[1:])
print(f"messages {messages}")
print(f"fieldline         {ours / messages:7.1f} bytes a message")
print(f"postgres, jsonb   {jsonb / messages:7.1f} bytes a message: ratio {ours / jsonb:.4f} (1/{jsonb / ours:.1f})")
print(f"postgres, typed   {typed / messages:7.1f} bytes a message: ratio {ours / typed:.4f} (1/{typed / ours:.1f})")
print("goal: at most 0.1250 against rows of the same messages:", "met" if ours / jsonb <= 0.125 else "NOT met")
PY
