# Sourced by the other scripts, which set root (the checkout) first. It chooses the environment:
#   env_dir  the active virtual or conda environment, else .venv in the checkout
#   own      yes when that is the checkout's .venv, which setup_env.sh makes and fills
#   PY       the environment's python

if [ -n "${VIRTUAL_ENV:-}" ]; then
    env_dir=$VIRTUAL_ENV
elif [ -n "${CONDA_PREFIX:-}" ]; then
    env_dir=$CONDA_PREFIX
else
    env_dir=$root/.venv
fi

own=no
if [ "$env_dir" = "$root/.venv" ]; then
    own=yes
elif [ -d "$env_dir" ] && [ -d "$root/.venv" ]; then # the same folder under another name
    [ "$(cd -- "$env_dir" && pwd -P)" != "$(cd -- "$root/.venv" && pwd -P)" ] || own=yes
fi

PY=$env_dir/bin/python
