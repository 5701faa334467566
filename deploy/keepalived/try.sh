#!/bin/sh
# Shows the pair at work: two network namespaces on this machine, nginx and keepalived in each, filled from the templates.
# The balancer that has the address is stopped, then its whole machine; prints how long the address was away.
# Needs root, nginx-light, libnginx-mod-stream, keepalived, curl and iproute2. Leaves nothing behind.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
pids=""
finish() {
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    sleep 1
    for name in flb-out flb-1 flb-2; do ip netns del $name 2>/dev/null || true; done
    rm -rf "$work"
}
trap finish EXIT INT TERM

# One network of three: outside, and the two balancers.
ip netns add flb-out
ip netns exec flb-out ip link add bridge type bridge
for number in 1 2; do
    ip netns add flb-$number
    ip link add balancer netns flb-$number type veth peer name to-$number netns flb-out
    ip netns exec flb-out ip link set to-$number master bridge
    ip netns exec flb-out ip link set to-$number up
    ip netns exec flb-$number ip link set lo up
    ip netns exec flb-$number ip addr add 10.99.0.$number/24 dev balancer
    ip netns exec flb-$number ip link set balancer up
done
ip netns exec flb-out ip addr add 10.99.0.100/24 dev bridge
ip netns exec flb-out ip link set bridge up
install -m 755 "$here/check.sh" "$work/check.sh"
chmod 755 "$work"

nginx_in() {
    ip netns exec flb-"$1" nginx -c "$work/$1/nginx.conf" -g 'daemon off; master_process off;' &
    eval "nginx_$1=$!"
    pids="$pids $!"
}
for number in 1 2; do
    mkdir -p "$work/$number"
    export RUN="$work/$number/nginx.pid" LOG="$work/$number" CACHE="$work/$number" RUN_AS=root
    export STREAM_MODULE=/usr/lib/nginx/modules/ngx_stream_module.so
    export INTERFACE=balancer SHARED_ADDRESS=10.99.0.10/24 OWN_ADDRESS=10.99.0.$number OTHER_ADDRESS=10.99.0.$((3 - number))
    export CHECK="$work/check.sh" PRIORITY=$((200 - 50 * number))
    if [ $number = 1 ]; then export PART=MASTER; else export PART=BACKUP; fi
    sh "$here/../fill.sh" "$here/../nginx/nginx.conf.template" > "$work/$number/nginx.conf"
    sh "$here/../fill.sh" "$here/keepalived.conf.template" > "$work/$number/keepalived.conf"
    nginx_in $number
    ip netns exec flb-$number keepalived --dont-fork --log-console --use-file "$work/$number/keepalived.conf" \
        --pid "$work/$number/k.pid" --vrrp_pid "$work/$number/v.pid" > "$work/$number/keepalived.log" 2>&1 &
    eval "keepalived_$number=$!"
    pids="$pids $!"
done

holder() {
    for number in 1 2; do
        if ip -n flb-$number -brief addr show balancer | grep -q 10.99.0.10/; then printf '%s' $number; fi
    done
}
ask() { ip netns exec flb-out curl --fail --silent --output /dev/null --max-time 0.5 http://10.99.0.10/balancer; }
await() {
    began=$(date +%s%N)
    while ! { [ "$(holder)" = "$1" ] && ask; }; do
        if [ $(($(date +%s%N) - began)) -gt 30000000000 ]; then
            echo "not in 30 s: the address is at [$(holder)]"; cat "$work"/*/keepalived.log; exit 1
        fi
        sleep 0.05
    done
    echo "$2: the address is at balancer $1 and answers after $((($(date +%s%N) - began) / 1000000)) ms"
}
await 1 "both started"
kill "$nginx_1"
await 2 "nginx of balancer 1 stopped"
nginx_in 1
await 1 "nginx of balancer 1 started"
ip -n flb-1 link set balancer down
# Balancer 1 still believes that it has the address; nobody hears it.
began=$(date +%s%N)
while ! ask; do
    if [ $(($(date +%s%N) - began)) -gt 30000000000 ]; then echo "not in 30 s"; exit 1; fi
    sleep 0.05
done
echo "balancer 1 cut off: the address answers after $((($(date +%s%N) - began) / 1000000)) ms"
