"""Record whole runs of a checkpoint folder by the reference, with every noise tensor, for other implementations.

    python tools/demo/record_run.py assets/demo tests/goldens-demo

Writes t2v.safetensors and i2v.safetensors: the maths is f32 on the stored weights; names and metadata are those of
tests/goldens.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import configs  # noqa: E402
import data  # noqa: E402
from reference.pipeline import Noise, Pipeline  # noqa: E402

SIZE, STEPS, GUIDANCE, TILE = 128, [2, 2, 2], 2.0, 256


def record(pipeline, path, prompt, frames, image=None):
    noise = Noise(seed=1)
    first_steps = [3, 3, 3] if image is None else STEPS
    latents, stages = pipeline.generate(prompt, "", frames, SIZE, SIZE, first_steps, STEPS, GUIDANCE, GUIDANCE,
                                        noise, image)
    tensors = {f"noise.{k}": v for k, v in noise.record.items()} | stages | {"latents": latents}
    made = pipeline.decode(latents, TILE)
    tensors["frames"] = made[::4].contiguous()
    meta = {"prompt": prompt, "prompt_suffix": "", "negative_prompt": "", "checkpoint": "demo",
            "variant": configs.TRANSFORMER}
    numbers = {"height": SIZE, "width": SIZE, "temp": frames, "num_inference_steps": first_steps,
               "guidance_scale": GUIDANCE, "video_guidance_scale": GUIDANCE, "tiling": TILE, "frame_stride": 4,
               "first_generated_unit": 0 if image is None else 1}
    if image is None:
        numbers["video_num_inference_steps"] = STEPS
    else:
        tensors["image_u8"] = image
    meta |= {k: json.dumps(v) for k, v in numbers.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=meta)
    return made


def main():
    source, target = (pathlib.Path(a) for a in sys.argv[1:3])
    target.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(source, configs.TRANSFORMER)
    record(pipeline, target / "t2v.safetensors", "a red circle moves to the right", 3)
    image = data.Clip([data.Object("star", "yellow", 64.0, 64.0, 26.0)], "spins", "plain", 40.0)
    record(pipeline, target / "i2v.safetensors", "a yellow star spins", 2, data.render([image], 1)[0][0, 0])


if __name__ == "__main__":
    main()
