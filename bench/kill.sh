#!/usr/bin/env bash
# SIGKILL of master and worker at random moments under load, a hundred rounds by default: every acknowledged
# message is there once, in order. The suite runs a few rounds of the same test.
source "$(dirname "$0")/lib.sh"
machine
FIELDLINE_KILL_ROUNDS=${ROUNDS:-100} cargo test --release --locked --quiet --package fieldline --test it -- \
    --nocapture --exact kill::nothing_acknowledged_is_lost_or_doubled | grep -vE '^$|^running'
