"""Trainings of tiny models as processes, and what they leave."""

import os
import subprocess
import sys
from pathlib import Path

NUM_STEPS = 150
MODEL = (
    "{image_size_px: 32, patch_size_px: 16, vision_width: 16, vision_layers: 1, vision_heads: 2, "
    "text_width: 16, text_layers: 1, text_heads: 2, ffn_width: 32, max_positions: 40, "
    "embedding_width: 8, init_std: 0.1}"
)
COMMON = f"num_steps: {NUM_STEPS}\nbatch_size: 4\nmax_tokens: 20\nsaving: {{every_steps: 5}}\n"
QUEUE = "alignment: {queue_size: 10, momentum: 0.9}"
RECIPES = {
    "pretrain": f"vocab_size: 120\nmodel: {MODEL}\n"
    f"objective: {{reconstruction_weight: 1.0, {QUEUE}}}\n",
    "finetune captioning": "init: {base}\n",
    "finetune reconstruction": "init: {base}\n",
    "finetune retrieval": f"init: {{base}}\n{QUEUE}\n",
    "finetune vqa": "init: {base}\n",
    "finetune nlvr": "init: {base}\nfirst_merge_layer: 0\n",
}
DATA = {"finetune vqa": "asked.tar", "finetune nlvr": "pairs.jsonl"}


def recipe_of(command: str, world: Path, base: Path) -> str:
    data = world / DATA.get(command, "web")
    return f"data: [{data}]\n" + COMMON + RECIPES[command].replace("{base}", str(base))


def start(
    command: str, recipe: Path, out: Path, num_ranks: int = 1, *options: str
) -> subprocess.Popen[bytes]:
    arguments = ["-m", "openblip", *command.split(), str(recipe), "--out", str(out), *options]
    if num_ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
        arguments = [*torchrun, f"--nproc-per-node={num_ranks}", *arguments]
    return subprocess.Popen(
        [sys.executable, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def children_of(pid: int) -> list[int]:
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == pid:
            children.append(int(path.parent.name))
    return sorted(children)


def check_equal(first: Path, second: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    logs = [path.with_name(f"{path.name}.log.jsonl").read_bytes() for path in (first, second)]
    assert logs[0] == logs[1]
    for folder in (first, second):
        assert not folder.with_name(f"{folder.name}.state").exists()


def num_logged(out: Path) -> int:
    log = out.with_name(f"{out.name}.log.jsonl")
    return len(log.read_text().splitlines()) if log.exists() else 0
