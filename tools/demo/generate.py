"""Make one clip with the reference, on the CPU, as raw frames: a check of an exported folder.

    python tools/demo/generate.py assets/demo "a red circle moves to the right" out.npy [latent frames] [steps] [guidance] [seed]
"""

import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import configs  # noqa: E402
import scoring  # noqa: E402
from reference.pipeline import Noise, Pipeline  # noqa: E402


def main():
    folder, prompt, out, *rest = sys.argv[1:]
    frames, steps, guidance, seed = [t(v) for t, v in zip((int, int, float, int), rest + [7, 10, 2.0, 0][len(rest):])]
    pipeline = Pipeline(folder, configs.TRANSFORMER)
    began = time.time()
    latents, _ = pipeline.generate(prompt, "", frames, 128, 128, [steps] * 3, [steps] * 3, guidance, guidance,
                                   Noise(seed))
    sampled = time.time()
    made = pipeline.decode(latents)
    np.save(out, made.numpy())
    print(f"{len(made)} frames; sampling {sampled - began:.1f} s, decoding {time.time() - sampled:.1f} s; "
          f"the quick judge sees {scoring.judge(made)}")


if __name__ == "__main__":
    main()
