#!/usr/bin/env bash
# On every host of a TPU VM: the bucket at MOUNT, for data, and this checkout in .venv.
# Usage: setup.sh BUCKET MOUNT; may be run again.
set -euo pipefail
bucket=$1 mount=$2
cd "$(dirname "$0")/../.."

if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -q update
  sudo apt-get -q install -y gcsfuse
fi
if ! mountpoint -q "$mount"; then
  sudo mkdir -p "$mount"
  sudo chown "$(id -u):$(id -g)" "$mount"
  gcsfuse --implicit-dirs "$bucket" "$mount"
fi

# The images have Python 3.10. jax's extra [tpu] names its own libtpu, not that of [aot].
python3 -m pip install -q --user uv
python3 -m uv venv -q --clear --seed --python 3.12 .venv
grep -v '^libtpu==' constraints.txt >.venv/constraints.txt
.venv/bin/python -m pip install -q -c .venv/constraints.txt '.[bucket,text,tpu,train]'
