#!/bin/sh
# The steps of an image's build, called by the Dockerfile: steps.sh STEP [FILE]. Every step ends by giving what it wrote one
# date, SOURCE_DATE_EPOCH, so that building again from the same inputs gives the same layers.
set -eu

STACK=/opt/stack
LAB=/tmp/lab # where the Dockerfile mounts what a step needs
UV=$LAB/uv
export UV_CACHE_DIR=$LAB/cache UV_LINK_MODE=copy UV_NO_PROGRESS=1 UV_NO_CONFIG=1
export UV_PYTHON_INSTALL_DIR=/opt/python UV_PYTHON_INSTALL_BIN=0
export PYTHONHASHSEED=0 PYC_INVALIDATION_MODE=UNCHECKED_HASH
CERTIFICATES=/etc/ssl/certs/ca-certificates.crt
if [ -s "$CERTIFICATES" ]; then export UV_SYSTEM_CERTS=true; fi

base() {
    if [ -n "${PACKAGES:-}" ]; then
        apt-get update
        # shellcheck disable=SC2086 # a list of NAME=VERSION
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $PACKAGES
        apt-get clean
        rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache
    fi
    echo 'lab:x:10001:10001:sglang-lab:/home/lab:/bin/sh' >> /etc/passwd
    echo 'lab:x:10001:' >> /etc/group
    # the lab runs containers as the user who called it, whose number is unknown here: HOME is for everyone
    install -d -o 10001 -g 10001 -m 1777 /home/lab
    interpreter=$(finished "python${PYTHON%.*}")
    if [ -z "$interpreter" ]; then
        echo "no finished Python ${PYTHON%.*} in the base image: uv gets $PYTHON"
        "$UV" python install "$PYTHON"
        interpreter=$("$UV" python find --managed-python "$PYTHON")
    fi
    standard_library "$interpreter"
    "$UV" venv --quiet --python "$interpreter" "$STACK"
}

# Some Pythons come without bytecode, and a user who may not write it would compile at every start.
standard_library() {
    folder=$("$1" -I -c 'import os; print(os.path.dirname(os.__file__))')
    if [ -z "$(find "$folder/__pycache__" -name 'os.*.pyc' 2> /dev/null)" ]; then
        "$1" -I -m compileall -q -x '/(test|tests|lib2to3|site-packages|dist-packages)/' \
            --invalidation-mode unchecked-hash "$folder"
    fi
}

# The path of a Python if it is there and no pre-release: Ubuntu 22.04 has 3.11.0rc1.
finished() {
    "$1" -c 'import sys; print(sys.executable if sys.version_info.releaselevel == "final" else "")' 2> /dev/null || true
}

wheels() {
    "$UV" pip install --python "$STACK/bin/python" --no-deps --require-hashes --no-build --compile-bytecode \
        --find-links "$LAB/wheels" ${INDEX_URL:+--default-index "$INDEX_URL"} \
        ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} --requirement "$1"
}

# Its own requirements for building are in the lock and installed by now, which is why nothing is isolated.
build() {
    if [ ! -s "$1" ]; then return; fi
    "$UV" pip install --python "$STACK/bin/python" --no-deps --require-hashes --no-build-isolation --compile-bytecode \
        --find-links "$LAB/wheels" ${INDEX_URL:+--default-index "$INDEX_URL"} --requirement "$1"
}

# Compiled without site, which would import them through their .pth file and write bytecode of its own.
shims() {
    site=$("$STACK/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for entry in "$1"/*; do
        [ -e "$entry" ] || continue
        cp -R "$entry" "$site/"
        "$STACK/bin/python" -I -S -m compileall -q --invalidation-mode unchecked-hash "$site/${entry##*/}"
    done
}

smoke() {
    HOME=/tmp PYTHONDONTWRITEBYTECODE=1 "$STACK/bin/python" -I "$LAB/smoke.py" "$1" "$STACK/lab-image.json"
}

# Date what this step wrote: files, links, folders, and folders in which something was written.
date_all() {
    rm -f "$STACK/.lock" "$UV_PYTHON_INSTALL_DIR/.lock" # uv's, which everyone may write to
    find / -xdev -cnewer "$START" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +
}

START=$LAB/start
touch "$START"
sleep 0.02 # so that what comes is newer, also where the clock is coarse
case $1 in
    base) base ;;
    wheels) wheels "$2" ;;
    source) build "$2" ;;
    shims) shims "$2" ;;
    smoke) smoke "$2" ;;
    *) echo "unknown step: $1" >&2; exit 1 ;;
esac
date_all
