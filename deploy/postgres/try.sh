#!/bin/sh
# Shows a failover: three PostgreSQL under Patroni with patroni.yml and one etcd, all on this machine, and a client that
# writes numbers. The primary is killed, Patroni and all, under load; then the next primary's PostgreSQL alone; then the
# standby that commits wait for.
# Prints how long nothing was written, and whether a number is missing whose commit was confirmed.
# Needs etcd-server, postgresql, patroni and python3-psycopg2; as root it runs PostgreSQL as the user postgres.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)
user=""
if [ "$(id -u)" = 0 ]; then user="setpriv --reuid=postgres --regid=postgres --init-groups"; chown postgres "$work"; fi
base=${FIRST_PORT:-27400}
export PGPASSWORD=only-for-this-run PGCONNECT_TIMEOUT=2

finish() {
    # Each was started in a session of its own, whose number is its process's.
    for pid in "$work"/*.session; do
        [ -f "$pid" ] && kill -KILL "-$(cat "$pid")" 2>/dev/null || true
    done
    for number in 1 2 3; do
        [ -f "$work/$number/data/postmaster.pid" ] && kill -QUIT "$(head -1 "$work/$number/data/postmaster.pid")" 2>/dev/null || true
    done
    sleep 1
    rm -rf "$work"
}
trap finish EXIT INT TERM

setsid etcd --enable-v2 --data-dir "$work/etcd" --log-level error --listen-client-urls http://127.0.0.1:$base \
    --advertise-client-urls http://127.0.0.1:$base --listen-peer-urls http://127.0.0.1:$((base + 1)) \
    --initial-advertise-peer-urls http://127.0.0.1:$((base + 1)) --initial-cluster default=http://127.0.0.1:$((base + 1)) > "$work/etcd.log" 2>&1 &
echo $! > "$work/etcd.session"

start() {
    mkdir -p "$work/$1"
    [ -n "$user" ] && chown postgres "$work/$1"
    PATRONI_NAME=db-$1 PATRONI_ETCD_HOSTS=127.0.0.1:$base \
        PATRONI_RESTAPI_LISTEN=127.0.0.1:$((base + 10 + $1)) PATRONI_RESTAPI_CONNECT_ADDRESS=127.0.0.1:$((base + 10 + $1)) \
        PATRONI_POSTGRESQL_LISTEN=127.0.0.1:$((base + 20 + $1)) PATRONI_POSTGRESQL_CONNECT_ADDRESS=127.0.0.1:$((base + 20 + $1)) \
        PATRONI_POSTGRESQL_DATA_DIR="$work/$1/data" PATRONI_POSTGRESQL_BIN_DIR="$bin" PATRONI_POSTGRESQL_PGPASS="$work/$1/pgpass" \
        PATRONI_SUPERUSER_USERNAME=postgres PATRONI_SUPERUSER_PASSWORD=$PGPASSWORD \
        PATRONI_REPLICATION_USERNAME=replicator PATRONI_REPLICATION_PASSWORD=$PGPASSWORD \
        setsid $user patroni "$here/patroni.yml" >> "$work/$1.log" 2>&1 &
    echo $! > "$work/$1.session"
}
primary() {
    for number in 1 2 3; do
        if curl --silent --fail --max-time 1 --output /dev/null http://127.0.0.1:$((base + 10 + number))/primary; then
            printf '%s' $number; return
        fi
    done
}
synchronous() {
    for number in 1 2 3; do
        if curl --silent --fail --max-time 1 --output /dev/null http://127.0.0.1:$((base + 10 + number))/synchronous; then
            printf '%s' $number; return
        fi
    done
}
await() { # $1 says what, the rest is tried
    what=$1; shift
    began=$(date +%s%N)
    until "$@"; do
        if [ $(($(date +%s%N) - began)) -gt 120000000000 ]; then
            echo "waited 120 s for $what"; tail -n 15 "$work"/*.log; exit 1
        fi
        sleep 0.1
    done
}
formed() { [ -n "$(primary)" ] && [ -n "$(synchronous)" ]; }
for number in 1 2 3; do start $number; done
await "a primary and a synchronous standby" formed
echo "primary: db-$(primary), synchronous standby: db-$(synchronous)"

cat > "$work/writer.py" <<'PYTHON'
import os, sys, time
import psycopg2

ports, confirmed_path, stop_path = sys.argv[1:4]
hosts = ",".join("127.0.0.1" for _ in ports.split(","))
connect = lambda: psycopg2.connect(host=hosts, port=ports, user="postgres", dbname="postgres",
                                   target_session_attrs="read-write", options="-c statement_timeout=5s")
number, last, gap, connection = 1, None, 0.0, None
with open(confirmed_path, "w", buffering=1) as confirmed:
    while not os.path.exists(stop_path):
        try:
            if connection is None:
                connection = connect()
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute("CREATE TABLE IF NOT EXISTS numbers (n bigint PRIMARY KEY)")
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO numbers VALUES (%s) ON CONFLICT DO NOTHING", (number,))
            now = time.monotonic()
            if last is not None and now - last > 1:
                print(f"nothing was written for {now - last:.1f} s, after {number - 1} numbers", flush=True)
            last = now
            confirmed.write(f"{number}\n")
            number += 1
        except psycopg2.Error:
            connection = None
            time.sleep(0.1)
PYTHON
ports=$((base + 21)),$((base + 22)),$((base + 23))
# The system's own, for which Debian packages psycopg2.
/usr/bin/python3 "$work/writer.py" $ports "$work/confirmed" "$work/stop" &
writer=$!
touch "$work/confirmed"
count() { wc -l < "$work/confirmed"; }
further() { [ "$(count)" -gt $((before + 200)) ]; }
before=0
await "the first numbers" further

killed=$(primary)
echo "killing db-$killed, Patroni and PostgreSQL, after $(count) numbers"
kill -KILL "-$(cat "$work/$killed.session")" 2>/dev/null || true
kill -KILL "$(head -1 "$work/$killed/data/postmaster.pid")"
before=$(count)
await "numbers after the primary died" further
echo "primary: db-$(primary)"
start $killed
await "a primary and a synchronous standby" formed

killed=$(primary)
echo "killing PostgreSQL of db-$killed alone, after $(count) numbers"
before=$(count)
kill -KILL "$(head -1 "$work/$killed/data/postmaster.pid")"
await "numbers after PostgreSQL of the primary died" further
echo "primary: db-$(primary)"

await "a primary and a synchronous standby" formed
killed=$(synchronous)
echo "killing the synchronous standby db-$killed, after $(count) numbers"
before=$(count)
kill -KILL "-$(cat "$work/$killed.session")" 2>/dev/null || true
kill -KILL "$(head -1 "$work/$killed/data/postmaster.pid")"
await "numbers after the synchronous standby died" further

touch "$work/stop"
wait $writer
psql "host=127.0.0.1,127.0.0.1,127.0.0.1 port=$ports user=postgres dbname=postgres target_session_attrs=read-write" \
    --tuples-only --no-align --command "SELECT n FROM numbers" | sort > "$work/stored"
sort "$work/confirmed" > "$work/confirmed.sorted"
missing=$(comm -23 "$work/confirmed.sorted" "$work/stored" | wc -l)
echo "$(count) confirmed, $missing missing"
[ "$missing" = 0 ]
