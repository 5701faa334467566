#!/usr/bin/env bash
# Sockets to durable to acknowledged: messages a second and core, and the ratio to the wall of this disk
# (records of one group commit times syncs a second, measured in the same run). The claim: 50,000 a second
# and core, or half of the wall. BENCH_PROTOCOL=wialon_ips measures the text protocol.
set -euo pipefail
cd "$(dirname "$0")/.."
echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(uname -sr)"
exec cargo run --quiet --release --package fieldline-gateway --example ingest_bench
