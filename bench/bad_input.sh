#!/usr/bin/env bash
# Latency of well-behaved devices (sent to acknowledged) alone, and while 10,000 connections say nothing and others
# send random bytes, HTTP and unfinished frames: p99 moves by at most 10 %. In turn, ROUNDS rounds (3 unless told); medians.
#
# The attacker takes processor time on the same machine. So that it is the same in both cases, the attack that the
# devices are to be alone under is aimed at a second Fieldline: what is compared is what it does inside ours.
source "$(dirname "$0")/lib.sh"
machine
build_program
channel() {
    "$PROGRAM" ctl --url "$URL" create channels name=bench protocol=teltonika transport=tcp "listen=127.0.0.1:$1" \
        auto_register=true connections_max=15000 >/dev/null
    wait_for channel bash -c "exec 3<>/dev/tcp/127.0.0.1/$1"
}
other=$(free_port)
start_fieldline --no-master
channel "$other"
DATA=$WORK/other-data
port=$(free_port)
start_fieldline --no-master
channel "$port"

cat >"$WORK/attack.py" <<'PY'
import os, random, socket, sys, time
port, seconds = int(sys.argv[1]), float(sys.argv[2])
end = time.time() + seconds
silent = []
def connect():
    s = socket.create_connection(("127.0.0.1", port), timeout=5)
    s.setblocking(False)
    return s
while len(silent) < 10000 and time.time() < end:
    try:
        silent.append(connect())
    except OSError:
        time.sleep(0.05)
print("silent connections:", len(silent), file=sys.stderr, flush=True)
while time.time() < end:
    kind = random.randrange(3)
    try:
        s = connect()
        s.send([os.urandom(2048), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00\x0f3563"][kind])
        silent.append(s)
        silent.pop(0).close()
    except OSError:
        pass
    time.sleep(0.01)
PY
seconds=${SECONDS_EACH:-15}
simulate() {
    "$PROGRAM" simulate trackers --protocol teltonika --devices 100 --rate 10 --target "127.0.0.1:$port" \
        --duration "$seconds" --output json | python3 -c 'import json,sys; print(json.load(sys.stdin)["latency_ms"]["p99"])'
}
rss() { awk '/VmRSS/ {print int($2 / 1024)}' "/proc/$PID/status"; }
under_attack_on() {
    python3 "$WORK/attack.py" "$1" $((seconds + 10)) &
    local attack=$!
    sleep 7
    simulate >>"$WORK/$2"
    echo "round $round, attack on $2: memory $(rss) MiB"
    wait $attack
}
simulate >/dev/null
for round in $(seq "${ROUNDS:-3}"); do
    simulate >>"$WORK/alone"
    under_attack_on "$other" another
    under_attack_on "$port" ours
done
python3 - "$WORK/alone" "$WORK/another" "$WORK/ours" <<'PY'
import statistics, sys
alone, another, ours = ([float(line) for line in open(name)] for name in sys.argv[1:])
print("p99 without attack, ms        ", *[f"{x:8.2f}" for x in alone])
print("p99, attack on another, ms    ", *[f"{x:8.2f}" for x in another])
print("p99, attack on this server, ms", *[f"{x:8.2f}" for x in ours])
ratio = statistics.median(ours) / statistics.median(another)
print(f"ratio {ratio:.3f} (against no attack {statistics.median(ours) / statistics.median(alone):.3f}); goal: at most 1.10:",
      "met" if ratio <= 1.1 else "NOT met")
PY
