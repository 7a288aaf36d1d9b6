#!/usr/bin/env bash
# All that needs a GPU, in one go and within ten minutes: BERT Medium at the article's shape (baseline and the recommended
# recycling, each plain and with L2 to the initial weights, on the same seeds), the GPU rows of the benchmark, and FSDP2 on
# one device.
#
#   benchmarks/device.sh TEXT [OUTPUT]            TEXT: a file to train on (.txt, .jsonl, ...), some MB of English
#   SMALL=1 benchmarks/device.sh TEXT [OUTPUT]    the same on a CPU, tiny: whether the script works, and nothing else
#
# BIN: the folder of python, hf-recycle and accelerate (default: .venv/bin). Every part goes on where it was stopped, and one that fails does not
# stop the others; the exit status says whether one did.
set -u
cd "$(dirname "$0")/.."
text=$(realpath "${1:?name a text file}") output=$(realpath -m "${2:-runs/device}") bin=${BIN:-.venv/bin}
status=0
mkdir -p "$output"

# Six minutes are for the study: so many steps of 256 x 128 tokens in bf16 for each of its 4 arms x 2 seeds.
shape=(--bf16 true --fp16 false --max_steps "${STEPS:-600}" --eval_steps 200 --max_eval_samples 2048)
rows=(gpu-step gpu-use) launch=(--config_file recipes/accelerate/fsdp2.yaml --num_processes 1)
if [ -n "${SMALL:-}" ]; then
    shape=(--max_steps 20 --eval_steps 10 --max_eval_samples 16 --fp16 false --max_seq_length 16 --tokenizer_vocab_size 512
        --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --config_overrides
        "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=20")
    rows=(--quick gpu-step) launch=(--cpu --num_processes 1)
fi

part() { # NAME COMMAND...: runs it, and notes how it ended
    local name=$1 began=$SECONDS
    shift
    echo "== $name: $*"
    if timeout "${LIMIT:-400}" "$@" >"$output/$name.log" 2>&1; then echo "   done in $((SECONDS - began)) s"; else
        echo "   FAILED ($?) after $((SECONDS - began)) s, see $output/$name.log"
        tail -n 3 "$output/$name.log"
        status=1
    fi
}

nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null || echo "no GPU"
part study "$bin/hf-recycle" study recipes/studies/device.yaml --train_file "$text" "${shape[@]}" --output "$output/study"
part rows "$bin/python" -m benchmarks "${rows[@]}" --output "$output/rows.md"
part fsdp2 "$bin/accelerate" launch "${launch[@]}" -m hf_recycle.train scale/article preset/recommended \
    --train_file "$text" "${shape[@]}" --max_steps 20 --eval_strategy no --save_strategy no --output_dir "$output/fsdp2"
exit $status
