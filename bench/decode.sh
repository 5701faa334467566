#!/bin/sh
# Decoding per core: the protocol machine against hand-written decoders of the same frames.
# The last lines are `ratio PROTOCOL X`. Reads the vectors from $FIELDLINE_VECTORS.
set -eu
cd "$(dirname "$0")/.."
exec cargo run --quiet --release -p fieldline-pvm --example decode_ratio
