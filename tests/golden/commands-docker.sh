#!/usr/bin/env bash
# Repeats one run of the experiment 'radix' without the lab: SGLang 0.5.21, model nano.
# Needs bash, curl, Docker with the image sglang-lab/fake:000000000000, and the folders below. Results go to OUT, one folder a trial.
set -euo pipefail

IMAGE=${IMAGE:-sha256:0000000000000000000000000000000000000000000000000000000000000000}
MODEL=${MODEL:-'/lab-test/my models/nano'}
LAB=${LAB:-/lab-test/lab}
JIT=${JIT:-/lab-test/jit}
OUT=${OUT:-$PWD/repeat-$(date -u +%Y%m%dT%H%M%SZ)}
READY_S=300

ID=repeat-$$-$(date +%s)
CALLER=$(id -u):$(id -g)
SCRATCH=$(mktemp -d)
SERVER=
stop_server() {
  if [ -n "$SERVER" ]; then
    docker kill --signal SIGINT "$SERVER" > /dev/null 2>&1 || true
    for _ in $(seq 100); do running || break; sleep 0.2; done
    docker rm --force "$SERVER" > /dev/null
  fi
  SERVER=
}
running() { [ "$(docker inspect --format '{{.State.Running}}' "$SERVER")" = true ]; }
clean_up() {
  docker ps --all --quiet --filter "label=sglang-lab.run=$ID" | xargs -r docker rm --force > /dev/null
  docker network ls --quiet --filter "label=sglang-lab.run=$ID" | xargs -r docker network rm > /dev/null
  docker volume ls --quiet --filter "label=sglang-lab.run=$ID" | xargs -r docker volume rm > /dev/null
  rm -rf "$SCRATCH"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

wait_ready() {
  PORT=$(docker port "$SERVER" 30000/tcp | head -n 1); PORT=${PORT##*:}
  for _ in $(seq $((READY_S * 5))); do
    running || { tail -n 20 "$TRIAL/server.log"; echo "the server ended" >&2; exit 1; }
    curl -sf -o "$TRIAL/health" "http://127.0.0.1:$PORT/health" && return
    sleep 0.2
  done
  echo "the server was not ready after $READY_S s" >&2; exit 1
}

begin_load() {
  LOAD=$TRIAL/loads/$1; mkdir -p "$LOAD"
  echo "  load $1"
  curl -sf -X POST -o "$LOAD/flush" "http://127.0.0.1:$PORT/flush_cache"
  curl -sf -o "$LOAD/metrics-before.prom" "http://127.0.0.1:$PORT/metrics"
}

end_load() { sleep 0.5; curl -sf -o "$LOAD/metrics-after.prom" "http://127.0.0.1:$PORT/metrics"; }

mkdir -p "$JIT"
docker network create --driver bridge --label "sglang-lab.run=$ID" "sglang-lab-${ID}" > /dev/null
docker volume create --driver local --label "sglang-lab.run=${ID}" \
  --opt type=none \
  --opt o=bind \
  --opt "device=${MODEL}" \
  "sglang-lab-${ID}-model" > /dev/null
docker volume create --driver local --label "sglang-lab.run=${ID}" \
  --opt type=none \
  --opt o=bind \
  --opt "device=${JIT}" \
  "sglang-lab-${ID}-jit" > /dev/null

# ---- trial 1 of 1: cache-on, repeat 0
TRIAL=$OUT/000-cache-on-r0; mkdir -p "$TRIAL"
rm -rf "$SCRATCH"; mkdir -p "$SCRATCH/home" "$SCRATCH/tmp"
echo "trial 000-cache-on-r0"
SERVER="sglang-lab-${ID}-000-server"
docker run --detach \
  --name "sglang-lab-${ID}-000-server" \
  --label "sglang-lab.run=${ID}" \
  --user "${CALLER}" \
  --workdir /scratch \
  --entrypoint /bin/sh \
  --init \
  --stop-signal SIGINT \
  --cap-drop ALL \
  --security-opt no-new-privileges \
  --cpuset-cpus 0-27,64-91 \
  --cpuset-mems 0 \
  --shm-size 16000000000 \
  --ulimit memlock=-1:-1 \
  --ulimit stack=67108864:67108864 \
  --mount "type=bind,source=${TRIAL},target=/trial" \
  --mount "type=bind,source=${SCRATCH},target=/scratch" \
  --mount "type=bind,source=${LAB},target=/lab,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-model,target=/model,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-jit,target=/jit" \
  --gpus '"device=GPU-b9293e65-da7d-542c-977c-f64a9849c7af,GPU-9af0b4f9-996d-5673-81c6-c590d95bb570"' \
  --log-driver json-file \
  --log-opt max-size=10m \
  --log-opt max-file=1 \
  --network "sglang-lab-${ID}" \
  --memory 64000000000 \
  --memory-swap 64000000000 \
  --publish 127.0.0.1::30000 \
  --env HOME=/scratch/home \
  --env TMPDIR=/scratch/tmp \
  --env PATH=/opt/stack/bin:/usr/bin:/bin \
  --env LANG=C.UTF-8 \
  --env TZ=UTC \
  --env PYTHONUNBUFFERED=1 \
  --env USER=lab \
  --env LOGNAME=lab \
  --env TRITON_CACHE_DIR=/jit/triton \
  --env TORCHINDUCTOR_CACHE_DIR=/jit/inductor \
  --env FLASHINFER_WORKSPACE_BASE=/jit/flashinfer \
  --env SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false \
  --env SGLANG_LOG_MS=1 \
  --env CUDA_DEVICE_ORDER=PCI_BUS_ID \
  --env CUDA_VISIBLE_DEVICES=0,1 \
  --env PYTHONPATH=/lab/probe \
  --env LAB_PROBE_DIR=/trial/events \
  --env LAB_PROBE_LEVEL=cache \
  "${IMAGE}" \
  -c 'exec "$@" >> "$0" 2>&1' /trial/server.log \
  /opt/stack/bin/python -m sglang.launch_server \
  --model-path /model \
  --host 0.0.0.0 \
  --port 30000 \
  --device cuda \
  --enable-metrics \
  --decode-log-interval 10 \
  --random-seed 1 \
  --max-total-tokens 8192 \
  --tp-size 2 > /dev/null
wait_ready
begin_load warmup
docker run --rm \
  --name "sglang-lab-${ID}-000-warmup" \
  --label "sglang-lab.run=${ID}" \
  --user "${CALLER}" \
  --workdir /scratch \
  --entrypoint /bin/sh \
  --init \
  --stop-signal SIGINT \
  --cap-drop ALL \
  --security-opt no-new-privileges \
  --cpuset-cpus 28-31,92-95 \
  --cpuset-mems 0 \
  --shm-size 16000000000 \
  --ulimit memlock=-1:-1 \
  --ulimit stack=67108864:67108864 \
  --mount "type=bind,source=${TRIAL},target=/trial" \
  --mount "type=bind,source=${SCRATCH},target=/scratch" \
  --mount "type=bind,source=${LAB},target=/lab,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-model,target=/model,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-jit,target=/jit" \
  --log-driver json-file \
  --log-opt max-size=10m \
  --log-opt max-file=1 \
  --network "container:${SERVER}" \
  --env HOME=/scratch/home \
  --env TMPDIR=/scratch/tmp \
  --env PATH=/opt/stack/bin:/usr/bin:/bin \
  --env LANG=C.UTF-8 \
  --env TZ=UTC \
  --env PYTHONUNBUFFERED=1 \
  --env USER=lab \
  --env LOGNAME=lab \
  --env TRITON_CACHE_DIR=/jit/triton \
  --env TORCHINDUCTOR_CACHE_DIR=/jit/inductor \
  --env FLASHINFER_WORKSPACE_BASE=/jit/flashinfer \
  --env CUDA_DEVICE_ORDER=PCI_BUS_ID \
  --env CUDA_VISIBLE_DEVICES= \
  --env NVIDIA_VISIBLE_DEVICES=void \
  "${IMAGE}" \
  -c 'exec "$@" >> "$0" 2>&1' /trial/loads/warmup/client.log \
  /opt/stack/bin/python -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port 30000 \
  --model /model \
  --tokenizer /model \
  --dataset-name random-ids \
  --seed 100 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file /trial/loads/warmup/bench.jsonl \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 3 \
  --random-input-len 2048 \
  --random-output-len 16 \
  --random-range-ratio 1.0 \
  --tokenize-prompt
end_load
begin_load chat
docker run --rm \
  --name "sglang-lab-${ID}-000-chat" \
  --label "sglang-lab.run=${ID}" \
  --user "${CALLER}" \
  --workdir /scratch \
  --entrypoint /bin/sh \
  --init \
  --stop-signal SIGINT \
  --cap-drop ALL \
  --security-opt no-new-privileges \
  --cpuset-cpus 28-31,92-95 \
  --cpuset-mems 0 \
  --shm-size 16000000000 \
  --ulimit memlock=-1:-1 \
  --ulimit stack=67108864:67108864 \
  --mount "type=bind,source=${TRIAL},target=/trial" \
  --mount "type=bind,source=${SCRATCH},target=/scratch" \
  --mount "type=bind,source=${LAB},target=/lab,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-model,target=/model,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-jit,target=/jit" \
  --log-driver json-file \
  --log-opt max-size=10m \
  --log-opt max-file=1 \
  --network "container:${SERVER}" \
  --env HOME=/scratch/home \
  --env TMPDIR=/scratch/tmp \
  --env PATH=/opt/stack/bin:/usr/bin:/bin \
  --env LANG=C.UTF-8 \
  --env TZ=UTC \
  --env PYTHONUNBUFFERED=1 \
  --env USER=lab \
  --env LOGNAME=lab \
  --env TRITON_CACHE_DIR=/jit/triton \
  --env TORCHINDUCTOR_CACHE_DIR=/jit/inductor \
  --env FLASHINFER_WORKSPACE_BASE=/jit/flashinfer \
  --env CUDA_DEVICE_ORDER=PCI_BUS_ID \
  --env CUDA_VISIBLE_DEVICES= \
  --env NVIDIA_VISIBLE_DEVICES=void \
  "${IMAGE}" \
  -c 'exec "$@" >> "$0" 2>&1' /trial/loads/chat/client.log \
  /opt/stack/bin/python /lab/load/chat.py \
  --url http://127.0.0.1:30000 \
  --system-file /lab/data/handbook.md \
  --system-chars 8500 \
  --max-tokens 32 \
  --output-file /trial/loads/chat/chat.jsonl \
  --question 'What is Python?' \
  --question 'What is JavaScript?' \
  --question 'What is Rust?'
end_load
begin_load shared
docker run --rm \
  --name "sglang-lab-${ID}-000-shared" \
  --label "sglang-lab.run=${ID}" \
  --user "${CALLER}" \
  --workdir /scratch \
  --entrypoint /bin/sh \
  --init \
  --stop-signal SIGINT \
  --cap-drop ALL \
  --security-opt no-new-privileges \
  --cpuset-cpus 28-31,92-95 \
  --cpuset-mems 0 \
  --shm-size 16000000000 \
  --ulimit memlock=-1:-1 \
  --ulimit stack=67108864:67108864 \
  --mount "type=bind,source=${TRIAL},target=/trial" \
  --mount "type=bind,source=${SCRATCH},target=/scratch" \
  --mount "type=bind,source=${LAB},target=/lab,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-model,target=/model,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-jit,target=/jit" \
  --log-driver json-file \
  --log-opt max-size=10m \
  --log-opt max-file=1 \
  --network "container:${SERVER}" \
  --env HOME=/scratch/home \
  --env TMPDIR=/scratch/tmp \
  --env PATH=/opt/stack/bin:/usr/bin:/bin \
  --env LANG=C.UTF-8 \
  --env TZ=UTC \
  --env PYTHONUNBUFFERED=1 \
  --env USER=lab \
  --env LOGNAME=lab \
  --env TRITON_CACHE_DIR=/jit/triton \
  --env TORCHINDUCTOR_CACHE_DIR=/jit/inductor \
  --env FLASHINFER_WORKSPACE_BASE=/jit/flashinfer \
  --env CUDA_DEVICE_ORDER=PCI_BUS_ID \
  --env CUDA_VISIBLE_DEVICES= \
  --env NVIDIA_VISIBLE_DEVICES=void \
  "${IMAGE}" \
  -c 'exec "$@" >> "$0" 2>&1' /trial/loads/shared/client.log \
  /opt/stack/bin/python -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port 30000 \
  --model /model \
  --tokenizer /model \
  --dataset-name generated-shared-prefix \
  --seed 200 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file /trial/loads/shared/bench.jsonl \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 12 \
  --gsp-num-groups 2 \
  --gsp-prompts-per-group 6 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0
end_load
begin_load pressure
docker run --rm \
  --name "sglang-lab-${ID}-000-pressure" \
  --label "sglang-lab.run=${ID}" \
  --user "${CALLER}" \
  --workdir /scratch \
  --entrypoint /bin/sh \
  --init \
  --stop-signal SIGINT \
  --cap-drop ALL \
  --security-opt no-new-privileges \
  --cpuset-cpus 28-31,92-95 \
  --cpuset-mems 0 \
  --shm-size 16000000000 \
  --ulimit memlock=-1:-1 \
  --ulimit stack=67108864:67108864 \
  --mount "type=bind,source=${TRIAL},target=/trial" \
  --mount "type=bind,source=${SCRATCH},target=/scratch" \
  --mount "type=bind,source=${LAB},target=/lab,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-model,target=/model,readonly" \
  --mount "type=volume,source=sglang-lab-${ID}-jit,target=/jit" \
  --log-driver json-file \
  --log-opt max-size=10m \
  --log-opt max-file=1 \
  --network "container:${SERVER}" \
  --env HOME=/scratch/home \
  --env TMPDIR=/scratch/tmp \
  --env PATH=/opt/stack/bin:/usr/bin:/bin \
  --env LANG=C.UTF-8 \
  --env TZ=UTC \
  --env PYTHONUNBUFFERED=1 \
  --env USER=lab \
  --env LOGNAME=lab \
  --env TRITON_CACHE_DIR=/jit/triton \
  --env TORCHINDUCTOR_CACHE_DIR=/jit/inductor \
  --env FLASHINFER_WORKSPACE_BASE=/jit/flashinfer \
  --env CUDA_DEVICE_ORDER=PCI_BUS_ID \
  --env CUDA_VISIBLE_DEVICES= \
  --env NVIDIA_VISIBLE_DEVICES=void \
  "${IMAGE}" \
  -c 'exec "$@" >> "$0" 2>&1' /trial/loads/pressure/client.log \
  /opt/stack/bin/python -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port 30000 \
  --model /model \
  --tokenizer /model \
  --dataset-name generated-shared-prefix \
  --seed 300 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file /trial/loads/pressure/bench.jsonl \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 24 \
  --gsp-num-groups 8 \
  --gsp-prompts-per-group 3 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0
end_load
stop_server

echo "results are in $OUT"
