#!/usr/bin/env bash
# The whole command on a GPU machine, which may have no network and lack packages:
#
#     OUT=folder bash benchmarks/gpu.sh [options of benchmarks/gpu.py]
#
# Wheels of what is lacking come from .wheels/ in the checkout (`make wheels-gpu` fills it where there is a network; WHEELS names
# another folder). Everything that is learnt is in $OUT: lines.jsonl and output.txt as it comes, the rest at the end, packed.
# LIMIT is the most seconds it may take, whatever happens; --minutes (7.5 by default) is what it means to take.
set -u
cd "$(dirname "$0")/.." || exit
: "${OUT:?names the folder that results go to}"
python=${PYTHON:-python3} site=$(mktemp -d) limit=${LIMIT:-560}
mkdir -p "$OUT"
out=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export ELSA_TUNE_HOME="$out/home" ELSA_TUNE_DB="" OMP_WAIT_POLICY=passive

pack() { # what comes back is few files and small ones: built kernels stay behind
    for database in "$out"/home/measurements.db; do
        [ -f "$database" ] && "$python" - "$database" "$out/measurements.db.gz" <<'PACK'
import gzip, pathlib, sqlite3, sys
copy = sqlite3.connect(":memory:")
sqlite3.connect(sys.argv[1]).backup(copy)
pathlib.Path(sys.argv[2]).write_bytes(gzip.compress(copy.serialize()))
PACK
    done && rm -rf "$out/home"
    for file in "$out"/*.trials.jsonl; do [ -f "$file" ] && gzip -f "$file"; done
    rm -rf "$site"
}
trap pack EXIT

"$python" benchmarks/_gpu_wheels.py install "${WHEELS:-.wheels}" "$site" 2>&1 | tee -a "$out/output.txt"
[ "${PIPESTATUS[0]}" = 0 ] || exit 1
seconds=$((limit - SECONDS - 40)) # the wheels took some; the end is left some
[ "$seconds" -gt 450 ] && seconds=450
timeout --signal=TERM --kill-after=15 "$((limit - SECONDS))" "$python" benchmarks/gpu.py --out "$out" \
    --minutes "$((seconds / 60)).$((seconds % 60 * 10 / 60))" "$@" 2>&1 | tee -a "$out/output.txt"
exit "${PIPESTATUS[0]}"
