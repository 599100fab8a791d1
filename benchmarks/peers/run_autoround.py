"""AutoRound: signed gradient descent on the rounding, 200 steps for each block as it does by itself. See driver.py."""

from __future__ import annotations

import shutil

import torch
from auto_round import AutoRound
from driver import Case, Task, main
from transformers import AutoTokenizer


def case(bits: int, group: int, *, symmetric: bool = True, steps: int = 200) -> Case:
    settings = {"bits": bits, "group_size": group, "sym": symmetric, "iters": steps}

    def run(task: Task) -> None:
        ids, folder = task.ids, task.folder
        rounding = AutoRound(
            task.load(),
            AutoTokenizer.from_pretrained(task.model),
            scheme=f"W{bits}A16",
            group_size=group,
            sym=symmetric,
            iters=steps,
            dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids],
            seqlen=ids.shape[1],
            nsamples=len(ids),
            device_map="cpu",
        )
        with task.clock.running():  # packing of some megabytes is in it: quantizing and saving are one call
            rounding.quantize_and_save(str(folder), format="auto_round")
        for inner in [path for path in folder.iterdir() if path.is_dir()]:
            shutil.copytree(inner, folder, dirs_exist_ok=True)
            shutil.rmtree(inner)

    return Case(run, settings)


CASES = {
    "rtn-w4g128": case(4, 128, steps=0),
    "autoround-w4g128": case(4, 128),
    "autoround-w4g32": case(4, 32),
    "autoround-w4g32-asym": case(4, 32, symmetric=False),
    "autoround-w3g128": case(3, 128),
    "autoround-w2g32": case(2, 32),
}

if __name__ == "__main__":
    main("AutoRound", ("auto-round",), CASES)
