#!/usr/bin/env bash
# The program as it is shipped: size of the binary (at most 80 MB), time from exec to ready on an empty data
# directory (at most 1 s) and on one with data, and memory with the demo fleet after a minute (at most 100 MB).
source "$(dirname "$0")/lib.sh"
machine
build_program
cp "$PROGRAM" "$WORK/stripped"
strip "$WORK/stripped"
printf 'binary            %6.1f MB (%.1f MB without symbols); goal: at most 80\n' \
    "$(stat -c %s "$PROGRAM" | awk '{print $1 / 1e6}')" "$(stat -c %s "$WORK/stripped" | awk '{print $1 / 1e6}')"

start_time() {
    local http=$1 began
    began=$(date +%s%N)
    "$PROGRAM" up --data "$WORK/data" --http "$http" --mqtt "127.0.0.1:$(free_port)" --no-master "${@:2}" >/dev/null 2>"$WORK/log" &
    PID=$!
    until curl -sf "http://$http/readyz" >/dev/null; do sleep 0.005; done
    echo $((($(date +%s%N) - began) / 1000000))
}
stop() { kill "$PID" && wait "$PID" || true; }

http=127.0.0.1:$(free_port)
start_time "$http" >"$WORK/ms"
echo "start, empty      $(cat "$WORK/ms") ms to /readyz; goal: at most 1000"
stop
start_time "$http" --demo >/dev/null
sleep "${DEMO_SECONDS:-60}"
printf 'memory with demo  %6.1f MB resident; goal: at most 100\n' \
    "$(awk '/VmRSS/ {print $2 * 1024 / 1e6}' "/proc/$PID/status")"
stop
start_time "$http" >"$WORK/ms"
echo "start, with data  $(cat "$WORK/ms") ms to /readyz"
stop
