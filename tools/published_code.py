"""The published implementation as the other tools here run it: imported from a checkout, its pipeline put together.

The published code (github.com/jy0205/Pyramid-Flow) is unchanged but for this:

* IPython and tensorboardX, which are imported and not used here, are replaced by empty modules where they are missing;
  timm.models.layers and timm.models.hub are led to where later versions of timm keep them.
* A convolution whose input or output has more values than a 32-bit index counts, which cuDNN may refuse, is computed in
  bands of rows: the same products and sums.
* The pipeline object is put together here instead of by its constructor, which reads a whole checkpoint. Its text
  encoder is a stand-in that gives out embeddings which are there already; what noise it draws can be given to it, too.
"""

import importlib
import importlib.machinery
import math
import sys
import types

import torch
from torch.nn import functional as F

LARGEST, BAND = (1 << 31) - 1, 1 << 30  # values a convolution takes or gives at once; in each of the bands otherwise
VIDEO_GUIDANCE = 5.0  # published, of all units but the first


def guidance(family, size):
    """The published guidance of the first unit."""
    return 9.0 if (family, size) == ("sd3", "768p") else 7.0


def import_published(repo):
    def stand_in(name, **members):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(members)
        sys.modules[name] = module

    def missing(name):
        try:
            importlib.import_module(name)
        except ImportError:
            return True
        return False

    if missing("IPython"):
        stand_in("IPython", embed=None)
    if missing("tensorboardX"):
        stand_in("tensorboardX", SummaryWriter=None)
    for old, new in {"timm.models.layers": "timm.layers", "timm.models.hub": "timm.models"}.items():
        if missing(old):
            sys.modules[old] = importlib.import_module(new)
    sys.path.insert(0, str(repo))
    return importlib.import_module("pyramid_dit.pyramid_dit_for_video_gen_pipeline")


def in_bands(conv):
    """A forward for a Conv3d without padding that computes large convolutions in bands of rows."""
    kernel, stride = conv.kernel_size[1], conv.stride[1]

    def forward(x):
        rows = (x.shape[3] - kernel) // stride + 1
        output = conv.out_channels * x.shape[2] * rows * (x.shape[4] // conv.stride[2])
        largest = max(x.numel(), output)
        if largest <= LARGEST:
            return F.conv3d(x, conv.weight, conv.bias, conv.stride)
        band = math.ceil(rows / math.ceil(largest / BAND))
        parts = [F.conv3d(x[:, :, :, a * stride:(min(a + band, rows) - 1) * stride + kernel], conv.weight, conv.bias,
                          conv.stride) for a in range(0, rows, band)]
        return torch.cat(parts, 3)

    return forward


def block_noise(shape, gamma, generator=None, device=None):
    """Noise [B, C, T, H, W] whose 2x2 blocks have covariance (1 + gamma) I - gamma 11^T, for gamma 1/3."""
    batch, channels, frames, height, width = shape
    e = torch.randn(batch, channels, frames, height // 2, width // 2, 4, generator=generator, device=device)
    e = math.sqrt(1 + gamma) * (e - e.mean(-1, keepdim=True))
    return e.unflatten(-1, (2, 2)).permute(0, 1, 2, 3, 5, 4, 6).flatten(5).flatten(3, 4)


def assemble(module, family, dit=None, vae=None):
    """The published pipeline around a transformer or a VAE. `module` is what import_published gives."""
    sd3 = family == "sd3"
    pipeline = object.__new__(module.PyramidDiTForVideoGeneration)
    shift, scale = (0.1490, 1 / 1.8415) if sd3 else (-0.04, 1 / 1.8726)
    vars(pipeline).update(
        dit=dit, vae=vae, stages=[1, 2, 4], downsample=8, frame_per_unit=1, sequential_offload_enabled=False,
        model_name="pyramid_mmdit" if sd3 else "pyramid_flux", vae_shift_factor=shift, vae_scale_factor=scale,
        vae_video_shift_factor=-0.2343, vae_video_scale_factor=1 / 3.0986,
        scheduler=module.PyramidFlowMatchEulerDiscreteScheduler(
            shift=1.0, stages=3, stage_range=[0, 1 / 3, 2 / 3, 1], gamma=1 / 3))
    return pipeline


def give_text(pipeline, embeds, mask, pooled):
    """Has the text encoder give out these, each of the negative prompt and of the prompt."""
    # The pipeline asks for the prompt first and for the negative prompt then.
    answers = [tuple(x[i:i + 1] for x in (embeds, mask, pooled)) for i in (1, 0)]
    pipeline.text_encoder = lambda prompt, _: answers["hyper quality" not in prompt[-40:]]


def give_noise(pipeline, initial, blocks):
    """Has the pipeline draw this noise, the blocks in order; gives the list of those it has not drawn yet."""
    left = list(blocks)

    def drawn(noise, shape):
        if tuple(noise.shape) != shape:
            raise RuntimeError(f"the published pipeline draws noise of {shape}, there is some of {tuple(noise.shape)}")
        return noise

    def block(*shape):
        if not left:
            raise RuntimeError(f"the published pipeline draws more than {len(blocks)} block noises")
        return drawn(left.pop(0), shape)

    pipeline.prepare_latents = lambda batch, channels, frames, height, width, dtype, *_: drawn(
        initial, (batch, channels, frames, height // 8, width // 8)).to(dtype)
    pipeline.sample_block_noise = block
    return left


def generate(pipeline, height, width, units, steps, video_steps, guidance, video_guidance):
    """Latents [1, 16, units, height / 8, width / 8]."""
    return pipeline.generate(
        prompt="a clip", height=height, width=width, temp=units, num_inference_steps=list(steps),
        video_num_inference_steps=list(video_steps), guidance_scale=guidance, video_guidance_scale=video_guidance,
        output_type="latent")
