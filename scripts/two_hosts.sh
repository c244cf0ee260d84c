#!/usr/bin/env bash
# Two machines as two network namespaces of this one (own interfaces, one cable), two processes each
# under torchrun's rendezvous; full training of a tiny klein, its weights shared out over all four.
# One machine is killed in mid-iteration: the other has to end by itself, with a message and a
# status other than 0. Then both start again and resume.
#
#   sudo scripts/two_hosts.sh [FOLDER]     # about two minutes; FOLDER (default: a temporary one)
#                                          # keeps the run and what each machine said
#
# Needs Linux, root (to make namespaces), iproute2, and the packages of `pip install -e '.[dev]'`.
# Both namespaces see one file system, as machines of a cluster do. Removes what it made, except
# FOLDER where it was given. Not part of the test suite: CI has no root.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() { echo "two_hosts.sh: $1" >&2; exit 3; }
[ "$(uname)" = Linux ] || refuse "network namespaces are Linux's"
command -v ip >/dev/null || refuse "no ip command (accepted: with iproute2)"
[ "$(id -u)" = 0 ] || refuse "not root (accepted: root, which may make network namespaces)"

id=$$
hosts=(editr2-$id-a editr2-$id-b)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
cleanup() {
    for host in "${hosts[@]}"; do
        ip netns pids "$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del "$host" 2>/dev/null || true # its end of the cable goes with it
    done
    [ $# -gt 0 ] || rm -rf "$folder"
}
trap 'cleanup '"${1:+kept}" EXIT

ip netns add "${hosts[0]}" 2>/dev/null || refuse "no network namespace can be made here (a container without CAP_SYS_ADMIN?)"
ip netns add "${hosts[1]}"
ip link add ea$id netns "${hosts[0]}" type veth peer name eb$id netns "${hosts[1]}"
ip -n "${hosts[0]}" addr add 10.213.0.1/24 dev ea$id
ip -n "${hosts[1]}" addr add 10.213.0.2/24 dev eb$id
for host in "${hosts[@]}"; do ip -n "$host" link set lo up; done
ip -n "${hosts[0]}" link set ea$id up
ip -n "${hosts[1]}" link set eb$id up

python - "$folder" <<'PY'
import json, sys
from pathlib import Path

sys.path.insert(0, "tests")
import tiny_editors
from PIL import Image

folder = Path(sys.argv[1])
tiny_editors.klein_pipeline().save_pretrained(folder / "klein")
lines = []
for i, image in enumerate(tiny_editors.pictures(4, (32, 32))):
    Image.fromarray(image).save(folder / f"{i}.png")
    turns = [{"instruction": text} for text in ("make it red", "add a cat")[: 1 + i % 2]]
    lines.append(json.dumps({"id": f"s{i}", "image": f"{i}.png", "turns": turns}))
(folder / "sessions.jsonl").write_text("\n".join(lines) + "\n")
(folder / "run.json").write_text(json.dumps({
    "out": str(folder / "run"),
    "data": {"path": str(folder / "sessions.jsonl")},
    "reward": {"function": "editr2.rewards.brightness:Brightness"},
    "policy": {"model": "klein", "weights": str(folder / "klein"), "resolution": [32, 32],
               "text_tokens": 48, "shard": True},
    "rollout": {"sessions": 4, "siblings": 2, "steps": 3, "groups_per_batch": 1, "window": 2,
                "window_range": 0.34},
    "credit": {"preset": "flow-grpo", "weights": {"brightness": 1.0}, "baseline": None},
    "train": {"iterations": 6, "lr": 1e-3, "kl_weight": 0.1, "ema": 0.9},
    "eval": {"sessions": 2, "strips": 0},
    "checkpoint": {"every": 1},
}))
PY

start() { # NAME of the attempt; leaves the two torchruns' process ids in `runs`
    runs=()
    for n in 0 1; do
        interface=$([ $n = 0 ] && echo ea$id || echo eb$id)
        ip netns exec "${hosts[$n]}" env GLOO_SOCKET_IFNAME="$interface" OMP_NUM_THREADS=1 \
            CUDA_VISIBLE_DEVICES= python -m torch.distributed.run --nnodes 2 --nproc_per_node 2 \
            --rdzv_backend c10d --rdzv_endpoint 10.213.0.1:29400 --rdzv_id "$1" \
            --rdzv_conf "is_host=$((1 - n))" \
            --local_addr "10.213.0.$((n + 1))" -m editr2 train --config "$folder/run.json" \
            >"$folder/$1.host$n.txt" 2>&1 &
        runs+=($!)
    done
}

say() { echo "[$(date +%T)] $*"; }
say "two machines, two processes each"
start killed
for _ in $(seq 600); do
    grep -qs "iter 2/6" "$folder/killed.host0.txt" && break
    kill -0 "${runs[0]}" 2>/dev/null || { cat "$folder/killed.host0.txt"; exit 1; }
    sleep 0.2
done
sleep 0.5
say "second machine killed in mid-iteration (kill -9 of all that runs there)"
began=$(date +%s)
ip netns pids "${hosts[1]}" | xargs kill -9
status=0
timeout 300 tail --pid="${runs[0]}" -f /dev/null || { say "the first machine still waits"; exit 1; }
wait "${runs[0]}" || status=$?
say "first machine ended by itself after $(($(date +%s) - began)) s, status $status; it said:"
grep -h "does not answer\|do not answer" "$folder/killed.host0.txt" | sort -u
[ $status != 0 ] || exit 1

say "both machines again"
start resumed
for run in "${runs[@]}"; do wait "$run"; done
grep -h "resumed from\|^iter \|^after" "$folder/resumed.host0.txt"
say "finished: $(ls "$folder/run/policy")"
