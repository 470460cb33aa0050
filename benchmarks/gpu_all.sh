#!/usr/bin/env bash
# All GPU benchmarks at reduced counts, within nine minutes: a full table from a short spell on a GPU.
#   benchmarks/gpu_all.sh [FOLDER]
# Each part has its share of the time and is stopped after it; what is done by then is in benchmarks/results, and copied
# to FOLDER after each part. Ends with an error if a part did.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-}
failed=()

part() {
    local seconds=$1 name=$2
    echo "== $name"
    timeout "$seconds" "${PYTHON:-python}" "benchmarks/$name.py" --quick || failed+=("$name")
    if [[ -n $folder ]]; then
        mkdir -p "$folder" && cp benchmarks/results/"$name"*.json "$folder/" 2>/dev/null
    fi
}

part 60 gpu_nf4
part 150 gpu_train
part 130 gpu_stream
part 40 gpu_paged
part 60 gpu_load
part 90 gpu_generate

if ((${#failed[@]})); then
    echo "not finished: ${failed[*]}" >&2
    exit 1
fi
