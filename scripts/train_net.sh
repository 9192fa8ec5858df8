#!/bin/sh
# Trains with the plain loop on all GPUs of this machine, or of several; torchrun.sh tells the settings.
#
#     sh scripts/train_net.sh CONFIG [options] [KEY VALUE ...]
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
tool=train_net.py
. "$here/torchrun.sh"
