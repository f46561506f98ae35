#!/bin/sh
# Brings the project of the image into the volume on which Dagster works, before Dagster starts.
#
# In: the image's project, the workspace, and the params.yaml of this installation; VALR_REMOTE_URL, the DVC remote;
# DAGSTER_HOME, whose dagster.yaml the commands typed in the pod shall use too.
# Out: a workspace with the image's code and the installation's recipe. Always: dvc.lock, artifacts and caches stay as they
# are; code comes in whole folders, so that a module which the image dropped is not imported any more.
set -eu

fail() {
    printf 'prepare-workspace: %s\n' "$1" >&2
    exit 42
}

[ $# -eq 3 ] || fail "give the image's project, the workspace, and a params.yaml"
image=$1 workspace=$2 params=$3
[ -f "$image/dvc.yaml" ] || fail "$image has no dvc.yaml; it is not the project"
[ -f "$params" ] || fail "$params is not there; make the ConfigMap valr-params with the key params.yaml"
[ -w "$workspace" ] || fail "$workspace can't be written; give its volume fsGroup: $(id -g)"
case "${VALR_REMOTE_URL:-}" in
    s3://?*) ;;
    *) fail "VALR_REMOTE_URL='${VALR_REMOTE_URL:-}' is no s3:// address; set it to s3://BUCKET/PREFIX" ;;
esac

replace() {
    # Copied beside it and renamed: a restart in between leaves the old one or the new one.
    rm -rf "$workspace/.$2.new"
    cp -R "$1" "$workspace/.$2.new"
    rm -rf "${workspace:?}/$2"
    mv "$workspace/.$2.new" "$workspace/$2"
}

for entry in "$image"/* "$image/.dvcignore"; do
    name=${entry##*/}
    case $name in
        dvc.lock) [ -e "$workspace/dvc.lock" ] || cp "$entry" "$workspace/dvc.lock" ;;
        params.yaml) replace "$params" params.yaml ;;
        *) replace "$entry" "$name" ;;
    esac
done

mkdir -p "$workspace/.dvc" "$workspace/.valr/dagster" "$workspace/artifacts"
cp "$image/.dvc/config" "$workspace/.dvc/config"
cat >"$workspace/.dvc/config.local" <<END
[core]
    no_scm = true
    remote = store
['remote "store"']
    url = $VALR_REMOTE_URL
END
if [ -f "${DAGSTER_HOME:-}/dagster.yaml" ]; then
    cp "$DAGSTER_HOME/dagster.yaml" "$workspace/.valr/dagster/dagster.yaml"
fi
echo "prepare-workspace: $workspace holds the code of revision ${VALR_REVISION:-unknown}"
