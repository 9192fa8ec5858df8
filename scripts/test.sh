#!/bin/sh
# Sets the environment up and runs every check once: ruff (lint and format), mypy, pytest.
#
#     sh scripts/test.sh [pytest arguments]
#
# All four run even when one fails; the last line names those that did, and the exit status is 1 then.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup_env.sh"
. "$root/scripts/env.sh"
cd -- "$root"

failed=
check() {
    name=$1
    shift
    printf '\n== %s\n' "$name"
    "$PY" -m "$@" || failed="$failed${failed:+, }$name"
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
# One worker a core, one thread each: twice as fast as threads on two cores.
check "pytest" pytest -n auto --dist worksteal "$@"

if [ -n "$failed" ]; then
    printf '\ntest.sh: FAILED: %s\n' "$failed"
    exit 1
fi
printf '\ntest.sh: ruff check, ruff format, mypy and pytest passed\n'
