#!/bin/sh
# Joins Valkey servers to a cluster of masters with one replica each. Arguments: their addresses, host:port, half of which
# become masters. If they are a cluster already, it only waits until every slot is served.
set -eu

ask() { valkey-cli -h "${1%:*}" -p "${1##*:}" cluster info; }
ok() { ask "$1" | grep -q '^cluster_state:ok'; }

if ask "$1" | grep -q '^cluster_known_nodes:1.$'; then
    valkey-cli --cluster create "$@" --cluster-replicas 1 --cluster-yes
fi
for address in "$@"; do
    for attempt in $(seq 60); do
        if ok "$address"; then continue 2; fi
        sleep 1
    done
    echo "create-cluster.sh: $address does not see every slot served after a minute" >&2
    exit 1
done
