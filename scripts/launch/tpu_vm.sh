#!/usr/bin/env bash
# One run on all hosts of a TPU VM that has this repository in ~/lissom and uv installed:
#     TPU=my-tpu ZONE=us-central2-b scripts/launch/tpu_vm.sh --config=configs/language/stdlib_lm.py --workdir=/mnt/shared/run
# --workdir must be a folder that all hosts share.
set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"
command="cd lissom && LISSOM_DISTRIBUTED=1 uv run --extra tpu train.py$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
