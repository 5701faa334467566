# Shared by the scripts of bench/: peers started on free ports in a temporary folder, stopped at the end.
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
WORK=$(mktemp -d "${TMPDIR:-/tmp}/fieldline-bench.XXXXXX")
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
STOP=()

at_exit() {
    local command
    for command in "${STOP[@]:-}"; do
        [ -z "$command" ] || eval "$command" >/dev/null 2>&1 || true
    done
    rm -rf "$WORK"
}
trap at_exit EXIT

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Waits up to 20 seconds for a command to succeed.
wait_for() {
    local what=$1 n
    shift
    for n in $(seq 200); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    echo "$what did not become ready" >&2
    return 1
}

machine() {
    echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(uname -sr)"
}

# Starts PostgreSQL; sets PGHOST and PGPORT. It refuses to run as root, so it gets the user `postgres` then.
start_postgres() {
    local bin folder
    bin=$(dirname "$(ls /usr/lib/postgresql/*/bin/initdb | tail -1)")
    folder=$WORK/postgres
    mkdir "$folder"
    chmod 755 "$WORK"
    AS=()
    if [ "$(id -u)" = 0 ]; then
        chown postgres "$folder"
        AS=(runuser -u postgres --)
    fi
    export PGHOST=$folder PGPORT PGUSER=postgres PGDATABASE=postgres
    PGPORT=$(free_port)
    (cd "$folder" && "${AS[@]}" "$bin/initdb" -D "$folder/data" -U postgres -A trust -E UTF8 >/dev/null)
    (cd "$folder" && "${AS[@]}" "$bin/pg_ctl" -D "$folder/data" -w -l "$folder/log" \
        -o "-k $folder -p $PGPORT -c listen_addresses='' -c max_wal_size=4GB" start >/dev/null)
    STOP+=("cd '$folder' && ${AS[*]} '$bin/pg_ctl' -D '$folder/data' -m immediate stop")
}

# Builds the program as it is shipped, unless FIELDLINE_PROGRAM names one; sets PROGRAM.
build_program() {
    PROGRAM=${FIELDLINE_PROGRAM:-}
    if [ -z "$PROGRAM" ]; then
        cargo build --release --locked --quiet --package fieldline
        PROGRAM=$TARGET/release/fieldline
    fi
}

# Starts Fieldline on an empty data directory; sets DATA, URL and FIELDLINE_TOKEN. Further arguments go to `up`.
start_fieldline() {
    DATA=${DATA:-$WORK/data}
    local port mqtt
    port=$(free_port)
    mqtt=$(free_port)
    URL=http://127.0.0.1:$port
    export FIELDLINE_TOKEN=flt_bench0000000000000000000000000000000000000
    FIELDLINE_ADMIN_TOKEN=$FIELDLINE_TOKEN "$PROGRAM" up --data "$DATA" --http "127.0.0.1:$port" --mqtt "127.0.0.1:$mqtt" "$@" \
        >"$WORK/fieldline.out" 2>"$WORK/fieldline.log" &
    PID=$!
    STOP+=("kill $PID; wait $PID")
    wait_for Fieldline curl -sf "$URL/readyz" || { tail -20 "$WORK/fieldline.log" >&2; return 1; }
}
