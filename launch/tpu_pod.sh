#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU pod slice. (On a single TPU VM log in and
# use run.sh.)
#   bash launch/tpu_pod.sh NAME ZONE --config configs/mug.py --workdir /disk/mug
# NAME and ZONE are the slice's, the rest goes to hatjax.train. From outside of
# the project: CLOUDSDK_CORE_PROJECT=my-project. Once, before the first run:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="
#     git clone <this repository> hatjax && cd hatjax &&
#     python3.11 -m venv .venv && .venv/bin/pip install -e '.[tpu]'"
# HATJAX is the repository's folder on the workers (default: hatjax, at home).
# Records and workdir must be on a disk that all workers mount (Filestore or
# gcsfuse). It stays connected and shows all output: call it from tmux. Run it
# again to resume.
set -euo pipefail

usage='Usage: bash launch/tpu_pod.sh NAME ZONE [arguments of hatjax.train]'
name=${1:?$usage}
zone=${2:?$usage}
shift 2
command="cd ${HATJAX:-hatjax} && exec bash launch/run.sh --distributed"
[ $# -eq 0 ] || command+=$(printf ' %q' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="$command"
