#!/bin/sh
# Runs the demo with three seeds and records mean and spread in docs/data/demo.json; about a quarter of an hour.
#
#     sh scripts/demo_seeds.sh [FOLDER]      (default output/demo_seeds, which must not be there yet)
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup_env.sh"
. "$root/scripts/env.sh"
cd -- "$root"
folder=${1:-output/demo_seeds}
if [ -e "$folder" ]; then
    echo "error: $folder is there already; name another folder" >&2
    exit 2
fi
for seed in 0 1 2; do
    "$PY" scripts/demo.py --output "$folder/$seed" --seed "$seed"
done
"$PY" docs/render_tables.py --demo "$folder/0" "$folder/1" "$folder/2"
