#!/usr/bin/env bash
# (d) The last value of a parameter over HTTP against nginx serving a file of the same size, in the same run: at
# least 0.5. One worker each, the same load generator, in turn, three rounds; medians are compared.
source "$(dirname "$0")/lib.sh"
machine
build_program
# The limit on an account's requests is for tenants, not for a measurement.
printf '[http]\nrequests_per_s_max = 100000000\n' >"$WORK/config.toml"
start_fieldline --no-master --config "$WORK/config.toml"

json() { python3 -c "import json,sys; print(json.load(sys.stdin)$1)"; }
ctl() { "$PROGRAM" ctl --url "$URL" --output json "$@"; }
device=$(ctl create devices name=bench ident=bench | json '["id"]')
curl -sf -X POST "$URL/api/v1/devices/$device/messages" -H "Authorization: Bearer $FIELDLINE_TOKEN" \
    -H 'Content-Type: application/json' -d '[{"position.speed": 42.5, "battery.voltage": 12.61}]' >/dev/null
path=/api/v1/devices/$device/state/battery.voltage
body=$(curl -sf "$URL$path" -H "Authorization: Bearer $FIELDLINE_TOKEN")
echo "answer: ${#body} bytes: $body"

mkdir -p "$WORK/www" "$WORK/nginx"
printf '%s' "$body" >"$WORK/www/value.json"
port=$(free_port)
cat >"$WORK/nginx.conf" <<CONF
worker_processes 1;
pid $WORK/nginx/pid;
error_log $WORK/nginx/error.log;
events { worker_connections 1024; }
http {
    access_log off; sendfile on; tcp_nodelay on; keepalive_requests 100000000; open_file_cache max=10;
    types { application/json json; }
    client_body_temp_path $WORK/nginx/a; proxy_temp_path $WORK/nginx/b; fastcgi_temp_path $WORK/nginx/c;
    uwsgi_temp_path $WORK/nginx/d; scgi_temp_path $WORK/nginx/e;
    server { listen 127.0.0.1:$port; root $WORK/www; }
}
CONF
chmod -R a+rX "$WORK"
nginx=$(PATH=$PATH:/usr/sbin command -v nginx)
"$nginx" -c "$WORK/nginx.conf" -e "$WORK/nginx/error.log"
STOP+=("kill \$(cat $WORK/nginx/pid)")
wait_for nginx curl -sf "http://127.0.0.1:$port/value.json"

load() {
    wrk -t1 -c"${CONNECTIONS:-32}" -d"${SECONDS_EACH:-5}" -H "Authorization: Bearer $FIELDLINE_TOKEN" "$1" |
        awk '/Requests\/sec/ {r=$2} /Non-2xx/ {bad=$NF} END {if (bad) {print "errors" > "/dev/stderr"; exit 1} print r}'
}
load "$URL$path" >/dev/null
for round in 1 2 3; do
    load "http://127.0.0.1:$port/value.json" >>"$WORK/nginx.rps"
    load "$URL$path" >>"$WORK/ours.rps"
done
python3 - "$WORK/nginx.rps" "$WORK/ours.rps" <<'PY'
import statistics, sys
nginx, ours = ([float(line) for line in open(name)] for name in sys.argv[1:])
print("nginx     requests/s", *[f"{x:9.0f}" for x in nginx])
print("fieldline requests/s", *[f"{x:9.0f}" for x in ours])
ratio = statistics.median(ours) / statistics.median(nginx)
print(f"ratio {ratio:.2f}; goal: at least 0.50:", "met" if ratio >= 0.5 else "NOT met")
PY
