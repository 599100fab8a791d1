"""GPTQModel: GPTQ with and without act-order, GPTAQ, AWQ. See driver.py.

It keeps a pool of threads and refuses machines of two cores, so it is told of eight before it is imported, in the process of
each case: threads do not outlive a fork.
"""

from __future__ import annotations

import os
from typing import Any

from driver import Case, Task, main

BATCH = 8


def case(**arguments: Any) -> Case:
    def run(task: Task) -> None:
        os.cpu_count = lambda: 8
        from gptqmodel import GPTQModel, QuantizeConfig
        from gptqmodel.quantization import METHOD
        from gptqmodel.quantization.config import GPTAQConfig

        made = dict(arguments)
        if "method" in made:
            made["method"] = METHOD(made["method"])
        if "gptaq" in made:
            made["gptaq"] = GPTAQConfig(alpha=made["gptaq"])
        loaded = GPTQModel.load(str(task.model), QuantizeConfig(device="cpu", offload_to_disk=False, **made))
        rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in task.ids.tolist()]
        with task.clock.running():
            loaded.quantize(rows, batch_size=BATCH)
        loaded.save(str(task.folder))

    return Case(run, {**arguments, "batch": BATCH})


CASES = {
    "gptq-w4g128": case(bits=4, group_size=128),
    "gptq-w4g128-plain": case(bits=4, group_size=128, act_group_aware=False),
    "gptq-w4g128-actorder": case(bits=4, group_size=128, desc_act=True),
    "gptq-w4g128-damp01": case(bits=4, group_size=128, damp_percent=0.01),
    "gptq-w4g128-mse": case(bits=4, group_size=128, mse=2.4),
    "gptq-w4g32-mse": case(bits=4, group_size=32, mse=2.4),
    "gptq-w3g128-mse": case(bits=3, group_size=128, mse=2.4),
    "gptq-w4g128-asym": case(bits=4, group_size=128, sym=False, format="gptq_v2"),
    "gptaq-w4g128": case(bits=4, group_size=128, gptaq=0.25),
    "gptq-w4g32": case(bits=4, group_size=32),
    "gptaq-w4g32": case(bits=4, group_size=32, gptaq=0.25),
    "gptq-w3g128": case(bits=3, group_size=128),
    "gptaq-w3g128": case(bits=3, group_size=128, gptaq=0.25),
    "awq-w4g128": case(bits=4, group_size=128, method="awq"),
    "awq-w4g128-asym": case(bits=4, group_size=128, method="awq", sym=False),
}

if __name__ == "__main__":
    main("GPTQModel", ("gptqmodel",), CASES)
