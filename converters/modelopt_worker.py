"""nvidia-modelopt on one checkpoint, in an interpreter that has it: run as a script, it imports nothing of lconvert.

Argument: a JSON file {"source": folder, "config": name, "ids": [[token, ...], ...] or null, "device": name, "seed", "out": folder}; without
one ModelOpt is only imported. Standard output gets lines of JSON: {"done", "total"} after each window, and at the end one of
{"version"}, {"missing": why ModelOpt cannot be imported}, {"configs": those that exist} for an unknown one, and {"uncalibrated": true}
for one that needs ids and got none. Everything else that is printed goes to standard error; a failure ends there as a traceback.
"""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # ModelOpt prints

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        import modelopt
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
        from modelopt.torch.quantization.config import need_calibration
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        return say(missing=str(e))
    if not arguments:
        return say(version=modelopt.__version__)
    import torch

    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    if request["config"] not in mtq.config.choices:
        return say(configs=sorted(mtq.config.choices))
    config = copy.deepcopy(getattr(mtq, request["config"]))
    needed = need_calibration(config)
    if needed and not request["ids"]:
        return say(uncalibrated=True)
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype="auto")
    model = model.eval().to(request["device"])

    def calibrate(net: Any) -> None:
        for n, ids in enumerate(request["ids"]):
            net(torch.tensor([ids], device=request["device"]))
            say(done=n + 1, total=len(request["ids"]))

    torch.manual_seed(request["seed"])
    with torch.inference_mode():
        mtq.quantize(model, config, calibrate if needed else None)
        export_hf_checkpoint(model, export_dir=request["out"])
    return say(version=modelopt.__version__)


if __name__ == "__main__":
    main(sys.argv[1:])
