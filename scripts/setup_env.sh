#!/bin/sh
# Makes the environment that the demo, the tests and the training scripts run in:
#
#     sh scripts/setup_env.sh
#
# In an active virtual or conda environment only what is missing is added, and nothing installed is changed. A
# torch, torchvision, numpy or detectron2 that imports is never changed anywhere. Without one, .venv in the checkout is made, with the versions
# of requirements/constraints.txt. Running it again costs seconds, and completes what was interrupted.
#
#     PYTHON=python3.12               the python to make .venv with (3.10 to 3.13)
#     IMGCLS_CONSTRAINTS=/dev/null    for .venv: the newest versions instead of the pinned ones
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/env.sh"
constraints=${IMGCLS_CONSTRAINTS:-$root/requirements/constraints.txt}
quiet=
[ -t 1 ] || quiet=--quiet # no progress bars in a log

say() { printf 'setup_env: %s\n' "$@"; }
fail() { say "$@" >&2; exit 1; }

has_right_version() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

makes_venvs() { # where the distribution splits them off, one of these modules is missing
    has_right_version "$1" && "$1" -c 'import ensurepip, venv' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        makes_venvs "$PYTHON" || fail "PYTHON=$PYTHON does not run, is not Python 3.10 to 3.13, or has no venv module"
        base=$PYTHON
        return
    fi
    for base in python3.11 python3.12 python3.13 python3.10 python3 python; do
        ! makes_venvs "$base" || return 0
    done
    fail "no Python 3.10 to 3.13 with the venv module is on PATH" \
        "install one (on Debian or Ubuntu: apt install python3 python3-venv), or name one: PYTHON=/path/to/python3"
}

make_own_venv() {
    if "$PY" -c '' 2>/dev/null; then
        has_right_version "$PY" || fail "$env_dir has an unsuitable Python; remove that folder and run this script again"
    else # absent, or left half-made
        find_python
        say "making $env_dir with $base"
        "$base" -m venv --clear "$env_dir" || fail "$base could not make $env_dir"
    fi
}

check_active_env() {
    "$PY" -c '' 2>/dev/null || fail "the active environment $env_dir has no working bin/python; deactivate it"
    has_right_version "$PY" || fail "the active environment $env_dir is not Python 3.10 to 3.13; activate another, or none"
}

plan() {
    "$PY" "$root/scripts/env_plan.py" plan "$root" "$constraints" "$own" "$work" || fail "cannot examine $env_dir"
    [ ! -s "$work/stop" ] || fail "$(cat "$work/stop")"
}

pip_quietly() { # the wheel of detectron2 asks for numpy<2 without need, and pip would remind us of it every time
    "$PY" -m pip install --disable-pip-version-check --no-warn-conflicts $quiet "$@"
}

pip_install() {
    pip_quietly "$@" || fail \
        "pip failed; its reason stands above. Running this script again goes on from here." \
        "No network or another package index: set PIP_INDEX_URL (or PIP_PROXY) for pip, and run it again." \
        "A version that your index or platform lacks: in .venv, IMGCLS_CONSTRAINTS=/dev/null takes the newest;" \
        "in an active environment, where installed versions are held, install what pip named yourself."
}

install_torch() {
    say "installing torch and torchvision (some minutes, several GB with CUDA)"
    pip_install -c "$work/constraints" -r "$work/torch"
}

install_rest() {
    say "installing $(tr '\n' ' ' <"$work/rest")"
    if [ "$own" = yes ]; then
        pip_install -c "$work/constraints" -r "$work/rest"
    elif ! pip_quietly -c "$work/constraints" -r "$work/rest"; then
        say "these versions do not fit beside what is installed and stays; taking any that do"
        pip_install -c "$work/held" -r "$work/names"
    fi
}

install_detectron2() {
    say "installing detectron2 from the wheel in requirements/detectron2.txt"
    site=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    stage=$(mktemp -d "$site/.detectron2.XXXXXX") # on the same file system, so that placing it is a rename
    # The wheel is tagged for 3.10; its Python code runs on all of 3.10 to 3.13. Its dependencies stand in setup.py.
    pip_install --no-deps --only-binary=:all: --python-version 3.10 --target "$stage" \
        --require-hashes -r "$root/requirements/detectron2.txt"
    "$PY" "$root/scripts/env_plan.py" place "$stage" "$site"
}

install_imgcls() {
    pip_install --no-deps --no-build-isolation -e "$root"
}

if [ "$own" = yes ]; then make_own_venv; else check_active_env; fi
"$PY" -c 'import pip' 2>/dev/null || "$PY" -m ensurepip || fail "$env_dir has no pip, and ensurepip cannot add it"

work=$(mktemp -d)
stage=$work
trap 'rm -rf "$work" "$stage"' EXIT
trap 'exit 1' HUP INT TERM

plan
for step in torch rest detectron2 imgcls; do
    if [ -s "$work/$step" ]; then
        "install_$step"
        plan
        [ ! -s "$work/$step" ] || fail "still not there after installing: $(cat "$work/$step")" \
            "in .venv, remove that folder and run this script again; in an active environment, repair it by hand"
    fi
done
cat "$work/report"
