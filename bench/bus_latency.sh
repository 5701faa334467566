#!/usr/bin/env bash
# What the bus between nodes carries through an MQTT broker of this machine, and the latency that it adds at half of that:
# publish in one bus to received by another. Publisher, listener and mosquitto share the cores. Once with the settings of
# mosquitto that a cluster should have, once with the usual ones.
source "$(dirname "$0")/lib.sh"
machine
cargo build --quiet --release --locked --package fieldline-mqtt-bus --example bus_latency
mosquitto=$(PATH=$PATH:/usr/sbin command -v mosquitto)

measure() {
    local name=$1 port
    port=$(free_port)
    printf 'listener %s 127.0.0.1\nallow_anonymous true\nuser %s\n%b' "$port" "$(id -un)" "$2" >"$WORK/$name.conf"
    "$mosquitto" -c "$WORK/$name.conf" >"$WORK/$name.log" 2>&1 &
    STOP+=("kill $!")
    wait_for mosquitto bash -c "exec 3<>/dev/tcp/127.0.0.1/$port"
    echo "$name settings of mosquitto:"
    BENCH_PORT=$port "$TARGET/release/examples/bus_latency" | sed 's/^/  /'
}
measure advised 'max_inflight_messages 0\nmax_queued_messages 100000\nset_tcp_nodelay true\n'
measure usual ''
