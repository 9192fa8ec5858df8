#!/bin/sh
# Sets the environment up, then does the main job on images that ship with a dependency; about five minutes.
#
#     sh scripts/demo.sh [--output DIR] [--seed N]
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup_env.sh"
. "$root/scripts/env.sh"
cd -- "$root"
exec "$PY" scripts/demo.py "$@"
