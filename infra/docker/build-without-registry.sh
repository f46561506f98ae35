#!/usr/bin/env bash
# Builds and tries the image where there is neither a container engine nor a registry: on a Debian, as root.
#
# In: STORE (first argument), a folder with 20 GiB free. Out: the image valr:local in it, its base made of Debian's packages.
# Always: the Dockerfile is the released one; only BASE and where packages come from differ. Nothing outside of STORE is left.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
    printf 'build-without-registry: %s\n' "$1" >&2
    exit 1
}

[ $# -eq 1 ] || fail "give a folder for the images, with 20 GiB free"
[ "$(id -u)" -eq 0 ] || fail "chroot isolation needs root here; use docker build with infra/docker/Dockerfile instead"
for command in buildah mmdebstrap; do
    command -v "$command" >/dev/null || fail "$command is missing; apt-get install --no-install-recommends buildah mmdebstrap"
done
mkdir -p "$1"
store=$(realpath "$1")
readonly suite=${SUITE:-bookworm}
export BUILDAH_ISOLATION=chroot TMPDIR=$store

run() {
    buildah --root "$store/images" --runroot "$store/run" "$@"
}

# Folders from which pip takes packages; an index of files has them beside itself.
local_folders() {
    sed -n 's/^find-links = //p' "$settings" | tr ' ' '\n' | sed -n 's#^\(file://\)\?/#/#p'
    sed -n 's/^\(extra-\)\?index-url = //p' "$settings" | tr ' ' '\n' | sed -n 's#^file://\(/.*\)/[^/]*$#\1#p'
}

if ! run inspect --type image localhost/debian-python >/dev/null 2>&1; then
    mmdebstrap --variant=minbase --include=ca-certificates,python3,python3-venv,libpython3-dev "$suite" "$store/base.tar"
    container=$(run from scratch)
    run add --quiet "$container" "$store/base.tar" /
    run commit --quiet --rm "$container" localhost/debian-python
    rm "$store/base.tar"
fi

# The machine's own way to its packages: pip's settings, certificates, and folders of wheels that these name.
options=(--volume /etc/ssl/certs:/etc/ssl/certs:ro)
settings=$store/pip.conf
trap 'rm -f "$settings"' EXIT
printf '[global]\n' >"$settings"
.venv/bin/python -m pip config list | sed -n "s/^\(global\|:env:\)\.\(index-url\|extra-index-url\|find-links\|cert\|default-timeout\)='\(.*\)'$/\2 = \3/p" |
    sort -u >>"$settings"
while read -r folder; do
    options+=(--volume "$folder:$folder:ro")
done < <(local_folders | sort -u)

run bud --build-arg BASE=localhost/debian-python --build-arg "REVISION=$(git rev-parse HEAD)" --pull-never \
    --secret "id=pip,src=$settings" "${options[@]}" --file infra/docker/Dockerfile --tag valr:local .

# As a cluster runs it: a uid without rights, a command that needs the packages and the project.
container=$(run from --pull-never valr:local)
run run --user 10001:10001 "$container" -- python3 -m valr_ops run --help >/dev/null
run run --user 10001:10001 "$container" -- python3 -c 'import pipelines.definitions, mlflow, torch; print("torch", torch.__version__)'
# As Triton does for a compiled teacher.
# shellcheck disable=SC2016
run run --user 10001:10001 "$container" -- sh -c \
    'echo "#include <Python.h>" | gcc -shared -fPIC -I"$(python3 -c "import sysconfig; print(sysconfig.get_path(\"include\"))")" -x c - -o /tmp/built.so' ||
    fail "the image can't build what Triton needs"
# shellcheck disable=SC2016
run run "$container" -- sh -c 'for tool in g++ make; do ! command -v "$tool" || exit 1; done' ||
    fail "the image holds build tools"
run rm "$container" >/dev/null
echo "valr:local is built, in $store/images"
