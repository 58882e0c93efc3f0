#!/bin/bash
# A Cloud TPU VM or slice without SkyPilot: the current commit on all workers, in the background.
#
#   TPU=my-tpu ZONE=us-west4-a EXP=openwebtext WORKDIR=gs://my-bucket/runs/a launch/tpu_vm.sh
#   TPU=my-tpu ZONE=us-west4-a launch/tpu_vm.sh stop   # saves
#   TPU=my-tpu ZONE=us-west4-a launch/tpu_vm.sh logs
set -euo pipefail

on() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"; }

case "${1:-start}" in
stop) on all "pkill -TERM -f '[n]rgpt train'" ;;
logs) on 0 "tail -n 100 -F nrgpt/train.log" ;;
start)
    git archive --format=tar.gz --output=nrgpt.tar.gz HEAD
    gcloud compute tpus tpu-vm scp nrgpt.tar.gz "$TPU": --zone="$ZONE" --worker=all
    rm nrgpt.tar.gz
    on all 'set -eu; if pgrep -f "[n]rgpt train"; then echo it runs already >&2; exit 1; fi
        mkdir -p nrgpt && cd nrgpt && rm -rf nrgpt_jax experiments launch
        tar -xzf ~/nrgpt.tar.gz
        python3 -m pip install --quiet --target=.uv uv # brings a Python that is new enough
        .uv/bin/uv venv --quiet --allow-existing --python 3.11 .venv
        .uv/bin/uv pip install --quiet --python .venv/bin/python --constraint constraints.txt \
            ".[tpu,hf,gcs]"'
    train=$(printf "%q " .venv/bin/nrgpt train "$EXP" --workdir="$WORKDIR")
    on all "cd nrgpt && nohup $train ${ARGS:-} >> train.log 2>&1 < /dev/null &"
    ;;
esac
