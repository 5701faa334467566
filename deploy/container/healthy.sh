#!/bin/bash
# Whether Fieldline answers at FIELDLINE_HEALTH, host:port of its API. Nothing but bash is needed.
address=${FIELDLINE_HEALTH:-127.0.0.1:8080}
exec 3<>"/dev/tcp/${address%:*}/${address##*:}" || exit 1
printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "${1:-/healthz}" >&3
read -r -t 3 _ status _ <&3
[ "$status" = 200 ]
