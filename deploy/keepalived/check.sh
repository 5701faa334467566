#!/bin/sh
# Whether the balancer of this machine works: it answers by itself, whatever the nodes do.
# A node that is away is the balancer's business, and no reason to move the address.
exec curl --fail --silent --show-error --output /dev/null --max-time 2 "http://127.0.0.1:${1:-80}/balancer"
