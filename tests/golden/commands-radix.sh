#!/usr/bin/env bash
# Repeats one run of the experiment 'radix' without the lab: SGLang 0.5.21, model nano.
# Needs bash, curl and the folders below. Results go to OUT, one folder a trial.
set -euo pipefail

STACK=${STACK:-/lab-test/stack}
MODEL=${MODEL:-/lab-test/model}
LAB=${LAB:-/lab-test/lab}
JIT=${JIT:-/lab-test/jit}
OUT=${OUT:-$PWD/repeat-$(date -u +%Y%m%dT%H%M%SZ)}
PORT=${PORT:-31000}
READY_S=300

SCRATCH=$(mktemp -d)
SERVER=
stop_server() {
  if [ -n "$SERVER" ] && kill -0 "$SERVER" 2>/dev/null; then
    kill -INT "$SERVER"
    for _ in $(seq 100); do kill -0 "$SERVER" 2>/dev/null || break; sleep 0.2; done
    kill -KILL -- "-$SERVER" 2>/dev/null || true
    wait "$SERVER" 2>/dev/null || true
  fi
  SERVER=
}
trap 'stop_server; rm -rf "$SCRATCH"' EXIT
trap 'exit 130' INT TERM

wait_ready() {
  for _ in $(seq $((READY_S * 5))); do
    kill -0 "$SERVER" 2>/dev/null || { tail -n 20 "$TRIAL/server.log"; echo "the server ended" >&2; exit 1; }
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

# ---- trial 1 of 6: cache-on, repeat 0
TRIAL=$OUT/000-cache-on-r0; mkdir -p "$TRIAL"
rm -rf "$SCRATCH"; mkdir -p "$SCRATCH/home" "$SCRATCH/tmp"
echo "trial 000-cache-on-r0"
setsid env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false SGLANG_LOG_MS=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= "PYTHONPATH=${LAB}/probe" "LAB_PROBE_DIR=${TRIAL}/events" LAB_PROBE_LEVEL=cache \
  taskset -c 0,1,2 \
  "${STACK}/bin/python" -m sglang.launch_server \
  --model-path "${MODEL}" \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --device cpu \
  --dtype float32 \
  --enable-metrics \
  --decode-log-interval 10 \
  --random-seed 1 \
  --max-total-tokens 8192 \
  > "$TRIAL/server.log" 2>&1 &
SERVER=$!
wait_ready
begin_load warmup
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name random-ids \
  --seed 100 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 3 \
  --random-input-len 2048 \
  --random-output-len 16 \
  --random-range-ratio 1.0 \
  --tokenize-prompt \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load chat
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" "${LAB}/load/chat.py" \
  --url "http://127.0.0.1:${PORT}" \
  --system-file "${LAB}/data/handbook.md" \
  --system-chars 8500 \
  --max-tokens 32 \
  --output-file "${LOAD}/chat.jsonl" \
  --question 'What is Python?' \
  --question 'What is JavaScript?' \
  --question 'What is Rust?' \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load shared
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name generated-shared-prefix \
  --seed 200 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 12 \
  --gsp-num-groups 2 \
  --gsp-prompts-per-group 6 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0 \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load pressure
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name generated-shared-prefix \
  --seed 300 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 24 \
  --gsp-num-groups 8 \
  --gsp-prompts-per-group 3 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0 \
  >> "$LOAD/client.log" 2>&1
end_load
stop_server

# ---- trial 2 of 6: lfu, repeat 0
TRIAL=$OUT/001-lfu-r0; mkdir -p "$TRIAL"
rm -rf "$SCRATCH"; mkdir -p "$SCRATCH/home" "$SCRATCH/tmp"
echo "trial 001-lfu-r0"
setsid env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false SGLANG_LOG_MS=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= "PYTHONPATH=${LAB}/probe" "LAB_PROBE_DIR=${TRIAL}/events" LAB_PROBE_LEVEL=cache \
  taskset -c 0,1,2 \
  "${STACK}/bin/python" -m sglang.launch_server \
  --model-path "${MODEL}" \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --device cpu \
  --dtype float32 \
  --enable-metrics \
  --decode-log-interval 10 \
  --random-seed 1 \
  --max-total-tokens 8192 \
  --radix-eviction-policy lfu \
  > "$TRIAL/server.log" 2>&1 &
SERVER=$!
wait_ready
begin_load warmup
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name random-ids \
  --seed 100 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 3 \
  --random-input-len 2048 \
  --random-output-len 16 \
  --random-range-ratio 1.0 \
  --tokenize-prompt \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load pressure
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name generated-shared-prefix \
  --seed 300 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 24 \
  --gsp-num-groups 8 \
  --gsp-prompts-per-group 3 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0 \
  >> "$LOAD/client.log" 2>&1
end_load
stop_server

# ---- trial 3 of 6: cache-off, repeat 0
TRIAL=$OUT/002-cache-off-r0; mkdir -p "$TRIAL"
rm -rf "$SCRATCH"; mkdir -p "$SCRATCH/home" "$SCRATCH/tmp"
echo "trial 002-cache-off-r0"
setsid env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false SGLANG_LOG_MS=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= "PYTHONPATH=${LAB}/probe" "LAB_PROBE_DIR=${TRIAL}/events" LAB_PROBE_LEVEL=cache \
  taskset -c 0,1,2 \
  "${STACK}/bin/python" -m sglang.launch_server \
  --model-path "${MODEL}" \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --device cpu \
  --dtype float32 \
  --enable-metrics \
  --decode-log-interval 10 \
  --random-seed 1 \
  --max-total-tokens 8192 \
  --disable-radix-cache \
  > "$TRIAL/server.log" 2>&1 &
SERVER=$!
wait_ready
begin_load warmup
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name random-ids \
  --seed 100 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 3 \
  --random-input-len 2048 \
  --random-output-len 16 \
  --random-range-ratio 1.0 \
  --tokenize-prompt \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load chat
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" "${LAB}/load/chat.py" \
  --url "http://127.0.0.1:${PORT}" \
  --system-file "${LAB}/data/handbook.md" \
  --system-chars 8500 \
  --max-tokens 32 \
  --output-file "${LOAD}/chat.jsonl" \
  --question 'What is Python?' \
  --question 'What is JavaScript?' \
  --question 'What is Rust?' \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load shared
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name generated-shared-prefix \
  --seed 200 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 12 \
  --gsp-num-groups 2 \
  --gsp-prompts-per-group 6 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0 \
  >> "$LOAD/client.log" 2>&1
end_load
stop_server

# ---- trial 4 of 6: cache-on, repeat 1
TRIAL=$OUT/003-cache-on-r1; mkdir -p "$TRIAL"
rm -rf "$SCRATCH"; mkdir -p "$SCRATCH/home" "$SCRATCH/tmp"
echo "trial 003-cache-on-r1"
setsid env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false SGLANG_LOG_MS=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= "PYTHONPATH=${LAB}/probe" "LAB_PROBE_DIR=${TRIAL}/events" LAB_PROBE_LEVEL=cache \
  taskset -c 0,1,2 \
  "${STACK}/bin/python" -m sglang.launch_server \
  --model-path "${MODEL}" \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --device cpu \
  --dtype float32 \
  --enable-metrics \
  --decode-log-interval 10 \
  --random-seed 1 \
  --max-total-tokens 8192 \
  > "$TRIAL/server.log" 2>&1 &
SERVER=$!
wait_ready
begin_load warmup
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name random-ids \
  --seed 101 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 3 \
  --random-input-len 2048 \
  --random-output-len 16 \
  --random-range-ratio 1.0 \
  --tokenize-prompt \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load chat
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" "${LAB}/load/chat.py" \
  --url "http://127.0.0.1:${PORT}" \
  --system-file "${LAB}/data/handbook.md" \
  --system-chars 8500 \
  --max-tokens 32 \
  --output-file "${LOAD}/chat.jsonl" \
  --question 'What is Python?' \
  --question 'What is JavaScript?' \
  --question 'What is Rust?' \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load shared
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name generated-shared-prefix \
  --seed 201 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 12 \
  --gsp-num-groups 2 \
  --gsp-prompts-per-group 6 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0 \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load pressure
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name generated-shared-prefix \
  --seed 301 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 24 \
  --gsp-num-groups 8 \
  --gsp-prompts-per-group 3 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0 \
  >> "$LOAD/client.log" 2>&1
end_load
stop_server

# ---- trial 5 of 6: cache-off, repeat 1
TRIAL=$OUT/004-cache-off-r1; mkdir -p "$TRIAL"
rm -rf "$SCRATCH"; mkdir -p "$SCRATCH/home" "$SCRATCH/tmp"
echo "trial 004-cache-off-r1"
setsid env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false SGLANG_LOG_MS=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= "PYTHONPATH=${LAB}/probe" "LAB_PROBE_DIR=${TRIAL}/events" LAB_PROBE_LEVEL=cache \
  taskset -c 0,1,2 \
  "${STACK}/bin/python" -m sglang.launch_server \
  --model-path "${MODEL}" \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --device cpu \
  --dtype float32 \
  --enable-metrics \
  --decode-log-interval 10 \
  --random-seed 1 \
  --max-total-tokens 8192 \
  --disable-radix-cache \
  > "$TRIAL/server.log" 2>&1 &
SERVER=$!
wait_ready
begin_load warmup
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name random-ids \
  --seed 101 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 3 \
  --random-input-len 2048 \
  --random-output-len 16 \
  --random-range-ratio 1.0 \
  --tokenize-prompt \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load chat
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" "${LAB}/load/chat.py" \
  --url "http://127.0.0.1:${PORT}" \
  --system-file "${LAB}/data/handbook.md" \
  --system-chars 8500 \
  --max-tokens 32 \
  --output-file "${LOAD}/chat.jsonl" \
  --question 'What is Python?' \
  --question 'What is JavaScript?' \
  --question 'What is Rust?' \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load shared
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name generated-shared-prefix \
  --seed 201 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 12 \
  --gsp-num-groups 2 \
  --gsp-prompts-per-group 6 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0 \
  >> "$LOAD/client.log" 2>&1
end_load
stop_server

# ---- trial 6 of 6: lfu, repeat 1
TRIAL=$OUT/005-lfu-r1; mkdir -p "$TRIAL"
rm -rf "$SCRATCH"; mkdir -p "$SCRATCH/home" "$SCRATCH/tmp"
echo "trial 005-lfu-r1"
setsid env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false SGLANG_LOG_MS=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= "PYTHONPATH=${LAB}/probe" "LAB_PROBE_DIR=${TRIAL}/events" LAB_PROBE_LEVEL=cache \
  taskset -c 0,1,2 \
  "${STACK}/bin/python" -m sglang.launch_server \
  --model-path "${MODEL}" \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --device cpu \
  --dtype float32 \
  --enable-metrics \
  --decode-log-interval 10 \
  --random-seed 1 \
  --max-total-tokens 8192 \
  --radix-eviction-policy lfu \
  > "$TRIAL/server.log" 2>&1 &
SERVER=$!
wait_ready
begin_load warmup
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name random-ids \
  --seed 101 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 3 \
  --random-input-len 2048 \
  --random-output-len 16 \
  --random-range-ratio 1.0 \
  --tokenize-prompt \
  >> "$LOAD/client.log" 2>&1
end_load
begin_load pressure
env -i "HOME=${SCRATCH}/home" "TMPDIR=${SCRATCH}/tmp" "PATH=${STACK}/bin:/usr/bin:/bin" LANG=C.UTF-8 TZ=UTC PYTHONUNBUFFERED=1 USER=lab LOGNAME=lab "TRITON_CACHE_DIR=${JIT}/triton" "TORCHINDUCTOR_CACHE_DIR=${JIT}/inductor" "FLASHINFER_WORKSPACE_BASE=${JIT}/flashinfer" SGLANG_USE_CPU_ENGINE=1 CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES= \
  taskset -c 3 \
  "${STACK}/bin/python" -m sglang.bench_serving \
  --backend sglang \
  --host 127.0.0.1 \
  --port "${PORT}" \
  --model "${MODEL}" \
  --tokenizer "${MODEL}" \
  --dataset-name generated-shared-prefix \
  --seed 301 \
  --request-rate inf \
  --max-concurrency 1 \
  --warmup-requests 0 \
  --output-file "${LOAD}/bench.jsonl" \
  --output-details \
  --cache-report \
  --disable-tqdm \
  --num-prompts 24 \
  --gsp-num-groups 8 \
  --gsp-prompts-per-group 3 \
  --gsp-system-prompt-len 2048 \
  --gsp-question-len 64 \
  --gsp-output-len 16 \
  --gsp-range-ratio 1.0 \
  >> "$LOAD/client.log" 2>&1
end_load
stop_server

echo "results are in $OUT"
