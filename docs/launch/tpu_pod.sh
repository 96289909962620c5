#!/usr/bin/env bash
# Trains on every host of a Cloud TPU slice, from one's own machine. Again after a stop or a failure: the run goes on.
#   TPU=my-slice ZONE=us-east5-a SERVICES=10.0.0.11:8700,10.0.0.12:8700 docs/launch/tpu_pod.sh
# The checkout, the data and the run's folder lie on a file system that all hosts mount (Filestore, Lustre) at SHARED.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${SERVICES:?addresses of the rollout services, by comma}"
SHARED=${SHARED:-/mnt/shared}
CONFIG=${CONFIG:-configs/sql_fsdp.yaml}
# How the services are known and know us (docs/bridge.md): their certificate's authority, and the token.
BRIDGE=${BRIDGE:-bridge.tls_ca=$SHARED/gpu.pem bridge.token_file=$SHARED/token}

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

on_all_hosts "cd $SHARED/sqlrl_jax && python3 -m venv ~/venv && ~/venv/bin/pip install --quiet -e '.[learner,tpu]'"
on_all_hosts "cd $SHARED/sqlrl_jax && . ~/venv/bin/activate && \
    python launch.py --config $CONFIG --coordinator auto \
        trainer.run_dir=$SHARED/runs/sql trainer.resume_mode=latest 'generator.services=[$SERVICES]' $BRIDGE"
