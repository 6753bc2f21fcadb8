"""The three-stage flow schedule: stage noise levels, timesteps, and the renoising between stages."""

import math

import numpy as np

STAGES = 3
GAMMA = 1 / 3
TRAIN_STEPS = 1000


class Schedule:
    """Per stage: `start` and `end` noise levels (1 is pure noise) and the first and last of its 1000 timesteps."""

    def __init__(self):
        sigmas = (np.arange(TRAIN_STEPS, 0, -1) / TRAIN_STEPS).astype(np.float32).astype(np.float64)
        edge = [TRAIN_STEPS * i // STAGES for i in range(STAGES + 1)]
        self.original_start = [sigmas[edge[i]] for i in range(STAGES)]
        self.end = [sigmas[edge[i + 1]] if i + 1 < STAGES else 0.0 for i in range(STAGES)]
        self.start = [1.0]
        for i in range(1, STAGES):
            s = 1 - self.original_start[i]
            self.start.append(1 - s / (math.sqrt(1 + 1 / GAMMA) * (1 - s) + s))
        lengths = [a - b for a, b in zip(self.start, self.end)]
        ratio = [sum(lengths[:i]) / sum(lengths) for i in range(STAGES)] + [1.0]
        self.timesteps = []  # (first, last) of the evenly spaced training timesteps of each stage
        for i in range(STAGES):
            top = TRAIN_STEPS - math.floor(ratio[i] * TRAIN_STEPS)
            bottom = TRAIN_STEPS - min(math.floor(ratio[i + 1] * TRAIN_STEPS), TRAIN_STEPS - 1)
            self.timesteps.append((float(top), top - (top - bottom) * (TRAIN_STEPS - 1) / TRAIN_STEPS))

    def steps(self, stage, count):
        """Timesteps [count] and sigmas [count + 1] of one stage at inference."""
        first, last = self.timesteps[stage]
        sigmas = np.append(np.linspace(1.0, 1 / TRAIN_STEPS, count), 0.0)
        return np.linspace(first, last, count).astype(np.float32), sigmas.astype(np.float32)

    def renoise(self, stage):
        """(alpha, beta) of x <- alpha*upsampled + beta*block noise on entering a stage after the first."""
        s = 1 - self.original_start[stage]
        alpha = 1 / (math.sqrt(1 + 1 / GAMMA) * (1 - s) + s)
        return alpha, alpha * (1 - s) / math.sqrt(GAMMA)
