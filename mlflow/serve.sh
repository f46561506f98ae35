#!/usr/bin/env bash
# The tracking server of a team: runs in PostgreSQL, their files in S3.
#
#   MLFLOW_BACKEND_STORE_URI=postgresql://USER:PASSWORD@HOST/mlflow
#   MLFLOW_ARTIFACTS_DESTINATION=s3://BUCKET/mlflow
#   AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL where the bucket is not Amazon's
#   MLFLOW_HOST (127.0.0.1), MLFLOW_PORT (5000)
#
# Everything comes by the environment, because `ps` shows arguments to everyone on the machine. Clients need neither the
# database nor the bucket: the server hands files through.
set -euo pipefail
cd -P "$(dirname "$0")/.."

fail() {
    printf 'mlflow/serve.sh: %s\n' "$1" >&2
    exit 42
}

case "${MLFLOW_BACKEND_STORE_URI:-}" in
    postgresql://* | postgresql+psycopg2://*) ;;
    *) fail "MLFLOW_BACKEND_STORE_URI is no postgresql:// address; set it to postgresql://USER:PASSWORD@HOST/DATABASE (for one machine without a team: valr ui)" ;;
esac
case "${MLFLOW_ARTIFACTS_DESTINATION:-}" in
    s3://?*) ;;
    *) fail "MLFLOW_ARTIFACTS_DESTINATION is no s3:// address; set it to s3://BUCKET/PREFIX" ;;
esac
python=.venv/bin/python
[ -x "$python" ] || python=python3
"$python" -c 'import psycopg2' 2>/dev/null ||
    fail "the package psycopg2 is missing; install the extra: pip install -c constraints.txt '.[team]'"

# SQLAlchemy 2.1 would take psycopg 3, which dagster-postgres can't use: one driver for both servers.
export MLFLOW_BACKEND_STORE_URI="${MLFLOW_BACKEND_STORE_URI/#postgresql:/postgresql+psycopg2:}"
export MLFLOW_HOST="${MLFLOW_HOST:-127.0.0.1}" MLFLOW_PORT="${MLFLOW_PORT:-5000}" MLFLOW_WORKERS="${MLFLOW_WORKERS:-1}"
exec "$python" -m mlflow --env-file mlflow/server.env server
