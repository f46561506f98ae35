#!/usr/bin/env bash
# The servers of a team on one machine: PostgreSQL, an S3 store, MLflow and Dagster, all on loopback; Ctrl-C stops them.
#
# In: POSTGRES_PORT (15432), S3_PORT (18080, and the next three), MLFLOW_PORT (5000), DAGSTER_PORT (3000).
# Out: data, logs and made-up passwords in .valr/services; .valr/services/environment.sh, with which another shell uses
# these servers. Always: what was stored is there at the next start; a server that ends takes the others down in order.
# `valr ui` needs none of this: it serves the files of one person.
set -euo pipefail
# Job control: a background job gets a process group of its own, and does not ignore the interrupt that stops it.
set -m
cd -P "$(dirname "$0")/../.."

readonly postgres_port=${POSTGRES_PORT:-15432} s3_port=${S3_PORT:-18080}
readonly mlflow_port=${MLFLOW_PORT:-5000} dagster_port=${DAGSTER_PORT:-3000}
readonly services=$PWD/.valr/services
readonly python=.venv/bin/python weed=.venv/bin/weed
# Read from the file that the first start writes.
postgres_password='' s3_key='' s3_secret=''

fail() {
    printf 'up: %s\n' "$1" >&2
    exit 1
}

find_postgres() {
    local initdb
    for initdb in "$(command -v initdb || true)" /usr/lib/postgresql/*/bin/initdb; do
        # A link may stand where the other commands don't.
        if [ -x "$initdb" ]; then
            dirname "$(realpath "$initdb")"
            return
        fi
    done
    fail "PostgreSQL is missing; install it (Debian, Ubuntu: apt-get install postgresql)"
}

# PostgreSQL refuses to run as root.
unprivileged() {
    if [ "$(id -u)" -eq 0 ]; then
        runuser -u postgres -- "$@"
    else
        "$@"
    fi
}

made_up() {
    od -An -N 18 -t x1 /dev/urandom | tr -d ' \n'
}

write_secrets() {
    if [ ! -f "$services/secrets.sh" ]; then
        (umask 077 && printf 'postgres_password=%s\ns3_key=%s\ns3_secret=%s\n' "$(made_up)" "$(made_up)" "$(made_up)" >"$services/secrets.new")
        mv "$services/secrets.new" "$services/secrets.sh"
    fi
    # shellcheck source=/dev/null
    source "$services/secrets.sh"
}

write_environment() {
    (
        umask 077
        cat >"$services/environment.sh" <<END
# Made by infra/local/up.sh. Holds passwords of this machine's servers.
export DAGSTER_HOME='$services/dagster'
export VALR_DAGSTER_DATABASE='postgresql+psycopg2://valr:$postgres_password@127.0.0.1:$postgres_port/dagster'
export MLFLOW_TRACKING_URI='http://127.0.0.1:$mlflow_port'
export AWS_ENDPOINT_URL='http://127.0.0.1:$s3_port'
export AWS_ACCESS_KEY_ID='$s3_key'
export AWS_SECRET_ACCESS_KEY='$s3_secret'
export AWS_DEFAULT_REGION='us-east-1'
END
    )
    # shellcheck source=/dev/null
    source "$services/environment.sh"
}

# Waits for an answer at the address, as long as the process lives.
wait_for() {
    local waiting
    # In the background, so that an interrupt is answered at once.
    "$python" - "$@" <<'END' &
import os, sys, time, urllib.error, urllib.request
name, address, pid = sys.argv[1:]
until = time.monotonic() + 180
while time.monotonic() < until:
    try:
        urllib.request.urlopen(address, timeout=2).close()
        sys.exit(0)
    except urllib.error.HTTPError:
        sys.exit(0)  # It answers; S3 says 403 to a stranger.
    except OSError:
        time.sleep(0.3)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        break
sys.exit(1)
END
    waiting=$!
    wait "$waiting" || fail "$1 did not start; the end of .valr/services/logs/$1.log: $(tail -n 3 "$services/logs/$1.log")"
}

start_postgres() {
    local data=$services/postgres bin
    bin=$(find_postgres)
    if [ "$(id -u)" -eq 0 ]; then
        id postgres >/dev/null 2>&1 || fail "as root PostgreSQL needs the user postgres; apt-get install postgresql makes it"
        install -d -o postgres -g postgres -m 700 "$data"
        unprivileged test -x "$data" || fail "the user postgres can't reach $data; work in a folder that others may enter, or not as root"
    else
        install -d -m 700 "$data"
    fi
    if [ ! -f "$data/complete" ]; then
        rm -rf "$data/cluster"
        # Written by the user who reads it: a stream of root's can't be opened again.
        # shellcheck disable=SC2016
        unprivileged sh -c 'umask 077 && cat >"$1"' _ "$data/password" <<<"$postgres_password"
        unprivileged "$bin/initdb" -D "$data/cluster" -U valr --auth=scram-sha-256 -E UTF8 --pwfile="$data/password" \
            >"$services/logs/postgres.log" 2>&1 || fail "initdb failed: $(tail -n 2 "$services/logs/postgres.log")"
        rm "$data/password"
        unprivileged touch "$data/complete"
    fi
    # No socket: its path may be too long, and everything here asks by address and password.
    unprivileged "$bin/pg_ctl" -D "$data/cluster" -w -t 60 -l "$data/log" \
        -o "-c listen_addresses=127.0.0.1 -c port=$postgres_port -c unix_socket_directories=''" start >/dev/null ||
        fail "PostgreSQL did not start; the end of .valr/services/postgres/log: $(tail -n 3 "$data/log")"
    local name
    for name in dagster mlflow; do
        PGPASSWORD=$postgres_password "$bin/psql" -h 127.0.0.1 -p "$postgres_port" -U valr -d postgres -qtAc \
            "SELECT 1 FROM pg_database WHERE datname = '$name'" | grep -q 1 ||
            PGPASSWORD=$postgres_password "$bin/createdb" -h 127.0.0.1 -p "$postgres_port" -U valr "$name"
    done
}

start_store() {
    mkdir -p "$services/s3"
    (
        umask 077
        cat >"$services/s3.json" <<END
{"identities": [{"name": "valr", "credentials": [{"accessKey": "$s3_key", "secretKey": "$s3_secret"}],
 "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
END
    )
    start store "$weed" server -dir="$services/s3" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false -master.electionTimeout=500ms -master.heartbeatInterval=100ms \
        -volume.max=20 -master.volumeSizeLimitMB=1024 -s3 -s3.config="$services/s3.json" -s3.port="$s3_port" -filer \
        -filer.port=$((s3_port + 1)) -volume.port=$((s3_port + 2)) -master.port=$((s3_port + 3)) \
        -s3.port.iceberg=0 -s3.port.lance=0 -volume.preStopSeconds=0
    wait_for store "http://127.0.0.1:$s3_port" "$!"
    # The first write is refused until the volumes are there.
    "$python" - <<'END' >>"$services/logs/store.log" 2>&1 || fail "the store takes no bucket; see .valr/services/logs/store.log"
import time

import boto3

client = boto3.client("s3")
for remaining in range(60, -1, -1):
    try:
        if "valr" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket="valr")
        client.put_object(Bucket="valr", Key="ready", Body=b"")
        break
    except Exception:
        if not remaining:
            raise
        time.sleep(0.5)
END
}

running=()

start() {
    local name=$1
    shift
    "$@" >"$services/logs/$name.log" 2>&1 </dev/null &
    running+=("$name:$!")
    # The shell then has nothing to say when it is interrupted.
    disown "$!"
}

stop_all() {
    trap - EXIT
    trap '' INT TERM
    local entry pid i
    for ((i = ${#running[@]} - 1; i >= 0; i--)); do
        entry=${running[i]} pid=${running[i]#*:}
        kill -INT -- "-$pid" 2>/dev/null || continue
        for _ in $(seq 100); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.2
        done
        kill -KILL -- "-$pid" 2>/dev/null && echo "up: ${entry%%:*} had to be killed" >&2
    done
    if [ -f "$services/postgres/cluster/postmaster.pid" ]; then
        unprivileged "$(find_postgres)/pg_ctl" -D "$services/postgres/cluster" -m fast -w stop >/dev/null 2>&1 || true
    fi
}

[ -x "$python" ] || fail "there is no .venv; make setup"
[ -x "$weed" ] || fail "the S3 store is missing; run make setup"
"$python" -c 'import dagster_postgres, psycopg2' 2>/dev/null ||
    fail "Dagster's PostgreSQL storage is missing; .venv/bin/pip install -c constraints.txt -e '.[team]'"
find_postgres >/dev/null
for port in "$postgres_port" "$s3_port" $((s3_port + 1)) $((s3_port + 2)) $((s3_port + 3)) "$mlflow_port" "$dagster_port"; do
    ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null ||
        fail "port $port is in use; stop what uses it, or choose another: POSTGRES_PORT, S3_PORT, MLFLOW_PORT, DAGSTER_PORT"
done
mkdir -p "$services/logs" "$services/dagster"
trap stop_all EXIT
trap 'exit 0' INT TERM

write_secrets
write_environment
cp infra/local/dagster-postgres.yaml "$services/dagster/dagster.yaml"
start_postgres
echo "PostgreSQL  127.0.0.1:$postgres_port, databases dagster and mlflow"
start_store
echo "S3          $AWS_ENDPOINT_URL, bucket valr"
MLFLOW_BACKEND_STORE_URI="postgresql://valr:$postgres_password@127.0.0.1:$postgres_port/mlflow" \
    MLFLOW_ARTIFACTS_DESTINATION=s3://valr/mlflow MLFLOW_PORT=$mlflow_port start mlflow mlflow/serve.sh
mlflow_pid=$!
start dagster "$python" -m dagster dev --host 127.0.0.1 --port "$dagster_port"
dagster_pid=$!
wait_for mlflow "http://127.0.0.1:$mlflow_port/health" "$mlflow_pid"
echo "MLflow      http://127.0.0.1:$mlflow_port"
wait_for dagster "http://127.0.0.1:$dagster_port/server_info" "$dagster_pid"
echo "Dagster     http://127.0.0.1:$dagster_port"
echo "Another shell uses them after: source .valr/services/environment.sh. Ctrl-C stops all four."
while true; do
    for entry in "${running[@]}"; do
        kill -0 "${entry#*:}" 2>/dev/null ||
            fail "${entry%%:*} ended by itself; the reason is in .valr/services/logs/${entry%%:*}.log"
    done
    # In the background, so that an interrupt is answered at once.
    sleep 1 &
    wait "$!"
done
