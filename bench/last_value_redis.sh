#!/usr/bin/env bash
# The last value of a parameter over HTTP from a node of a cluster, whose last values are in Redis, against an HTTP
# server that does a bare GET of the same Redis for each request, in the same run: at least 0.5. One worker each, the
# same load generator, in turn, three rounds; medians are compared. Before that, the same without HTTP.
source "$(dirname "$0")/lib.sh"
machine
build_program
cargo build --release --locked --quiet --package fieldline-redis --examples
start_postgres

port=$(free_port) redis=redis://127.0.0.1:$port
(cd "$WORK" && exec redis-server --port "$port" --bind 127.0.0.1 --save '' --appendonly no >"$WORK/redis.log") &
STOP+=("kill $!")
client=$(free_port) peer=$(free_port)
etcd=http://127.0.0.1:$client
etcd --data-dir "$WORK/etcd" --listen-client-urls "$etcd" --advertise-client-urls "$etcd" --log-level error \
    --listen-peer-urls "http://127.0.0.1:$peer" --initial-advertise-peer-urls "http://127.0.0.1:$peer" \
    --initial-cluster "default=http://127.0.0.1:$peer" >"$WORK/etcd.log" 2>&1 &
STOP+=("kill $!")
broker=$(free_port)
printf 'listener %s 127.0.0.1\nallow_anonymous true\nuser root\n' "$broker" >"$WORK/mosquitto.conf"
PATH=$PATH:/usr/sbin mosquitto -c "$WORK/mosquitto.conf" >"$WORK/mosquitto.log" 2>&1 &
STOP+=("kill $!")
wait_for Redis redis-cli -p "$port" ping
wait_for etcd curl -sf "$etcd/health"

"$TARGET/release/examples/last_value_bench" "$redis"

# The limit on an account's requests is for tenants, not for a measurement.
cat >"$WORK/node.toml" <<CONF
[node]
name = "bench"
etcd = ["$etcd"]
[postgres]
url = "postgres://postgres@/postgres?host=$PGHOST&port=$PGPORT"
[redis]
url = "$redis"
[mqtt_bus]
url = "mqtt://127.0.0.1:$broker"
[http]
requests_per_s_max = 100000000
CONF
http=$(free_port)
URL=http://127.0.0.1:$http
export FIELDLINE_TOKEN=flt_bench0000000000000000000000000000000000000
FIELDLINE_ADMIN_TOKEN=$FIELDLINE_TOKEN "$PROGRAM" serve --role rest --config "$WORK/node.toml" --http "127.0.0.1:$http" \
    >"$WORK/fieldline.out" 2>"$WORK/fieldline.log" &
STOP+=("kill $!; wait $!")
wait_for Fieldline curl -sf "$URL/readyz" || { tail -20 "$WORK/fieldline.log" >&2; exit 1; }

json() { python3 -c "import json,sys; print(json.load(sys.stdin)$1)"; }
ctl() { "$PROGRAM" ctl --url "$URL" --output json "$@"; }
device=$(ctl create devices name=bench ident=bench | json '["id"]')
curl -sf -X POST "$URL/api/v1/devices/$device/messages" -H "Authorization: Bearer $FIELDLINE_TOKEN" \
    -H 'Content-Type: application/json' -d '[{"position.speed": 42.5, "battery.voltage": 12.61}]' >/dev/null
path=/api/v1/devices/$device/state/battery.voltage
body=$(curl -sf "$URL$path" -H "Authorization: Bearer $FIELDLINE_TOKEN")
echo "answer: ${#body} bytes: $body"
redis-cli -p "$port" set bench:value "$body" >/dev/null
bare=$(free_port)
"$TARGET/release/examples/bare_get_http" "127.0.0.1:$bare" "$redis" bench:value &
STOP+=("kill $!")
wait_for "the peer" curl -sf "http://127.0.0.1:$bare/"

load() {
    wrk -t1 -c"${CONNECTIONS:-32}" -d"${SECONDS_EACH:-5}" -H "Authorization: Bearer $FIELDLINE_TOKEN" "$1" |
        awk '/Requests\/sec/ {r=$2} /Non-2xx/ {bad=$NF} END {if (bad) {print "errors" > "/dev/stderr"; exit 1} print r}'
}
load "$URL$path" >/dev/null
for round in 1 2 3; do
    load "http://127.0.0.1:$bare/" >>"$WORK/bare.rps"
    load "$URL$path" >>"$WORK/ours.rps"
done
python3 - "$WORK/bare.rps" "$WORK/ours.rps" <<'PY'
import statistics, sys
bare, ours = ([float(line) for line in open(name)] for name in sys.argv[1:])
print("bare GET  requests/s", *[f"{x:9.0f}" for x in bare])
print("fieldline requests/s", *[f"{x:9.0f}" for x in ours])
ratio = statistics.median(ours) / statistics.median(bare)
print(f"ratio {ratio:.2f}; goal: at least 0.50:", "met" if ratio >= 0.5 else "NOT met")
PY
