#!/bin/sh
# Trains with detectron2's DefaultTrainer on all GPUs of this machine, or of several; torchrun.sh tells the settings.
#
#     sh scripts/train_net_builtin.sh CONFIG [options] [KEY VALUE ...]
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
tool=train_net_builtin.py
. "$here/torchrun.sh"
