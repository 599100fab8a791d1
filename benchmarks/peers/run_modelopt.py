"""ModelOpt's configurations, exported as it exports to Hugging Face folders. See driver.py."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from driver import Case, Task, main
from modelopt.torch.export import export_hf_checkpoint

BATCH = 8


def case(name: str) -> Case:
    def run(task: Task) -> None:
        loaded = task.load()

        def forward(net: Any) -> None:
            for batch in task.ids.split(BATCH):
                net(batch)

        with task.clock.running(), torch.inference_mode():
            mtq.quantize(loaded, copy.deepcopy(getattr(mtq, name)), forward)
        with torch.inference_mode():
            export_hf_checkpoint(loaded, export_dir=task.folder)

    return Case(run, {"config": name, "batch": BATCH})


CASES = {
    "awq-w4g128": case("INT4_AWQ_CFG"),
    "rtn-w4g128": case("INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "w4a8-awq": case("W4A8_AWQ_BETA_CFG"),
    "smoothquant-w8a8": case("INT8_SMOOTHQUANT_CFG"),
    "w8a8": case("INT8_DEFAULT_CFG"),
    "fp8-static": case("FP8_DEFAULT_CFG"),
    "fp8-dynamic": case("FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "nvfp4": case("NVFP4_DEFAULT_CFG"),
    "nvfp4a16": case("W4A16_NVFP4_CFG"),
    "nvfp4-mse": case("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"),
    "nvfp4-4over6": case("NVFP4_FOUR_OVER_SIX_CFG"),
    "nvfp4-hessian": case("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"),
    "mxfp4": case("MXFP4_DEFAULT_CFG"),
}

if __name__ == "__main__":
    main("ModelOpt", ("nvidia-modelopt",), CASES)
