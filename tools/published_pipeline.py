"""The published implementation with random weights of the published size, built on the device without any file.

What differs from the published code, besides what tools/published_code.py and tools/published_calls.py list:

* Its classes are built from the published configurations and then filled as tools/random_checkpoint.py fills a
  checkpoint.
* The text encoder of the pipeline gives out random embeddings of prompts of 40 and 57 tokens.
* Block noise is drawn on the device, all at once (`block_noise`): the same distribution. The published loop draws
  every block of four values by a call of its own, on the CPU, and first factors a singular matrix, which PyTorch
  refuses on some machines. `Driver.loop_seconds` times that loop, with a matrix just short of singular.
"""

import datetime
import hashlib
import os
import pathlib
import subprocess
import time
import types

import torch

import random_checkpoint
from published_code import assemble, block_noise, generate, give_text, import_published, in_bands

TEXT_TOKENS, VALID = 128, (57, 40)  # T5 tokens of a prompt, and how many of them are no padding: negative, prompt


def configs(family, scale="full"):
    """Component -> (config, function that makes a module of tools/reference from it)."""
    out = {}
    for name, (_, config, make, _) in random_checkpoint.components(family).items():
        if scale == "tiny":
            config = {**config, **random_checkpoint.TINY.get(f"{family}/{name}", random_checkpoint.TINY.get(name, {}))}
        out[name] = (config, make)
    return out


def fill(module, make, config, device, dtype, seed=1):
    """Gives a module the values that tools/random_checkpoint.py would have written on this device.

    `make` builds the module of tools/reference, which has the names of the published files."""
    with torch.device("meta"):
        names = make(config).state_dict()
    weights = module.state_dict()
    with torch.no_grad():
        for name in names:
            # Newer versions of transformers keep some text models under shorter names than their files.
            weight = weights[name] if name in weights else weights[name.removeprefix("text_model.")]
            weight.copy_(random_checkpoint.draw(name, tuple(weight.shape), config, seed, device))
    return module.to(device, dtype).eval().requires_grad_(False)


def own_module(family, component, scale, device, dtype):
    """A component of tools/reference."""
    config, make = configs(family, scale)[component]
    with torch.device(device):
        return fill(make(config), make, config, device, dtype)


def text_inputs(config, device, dtype):
    """(embeddings, mask, pooled) of the negative prompt and the prompt."""
    generator = torch.Generator(device).manual_seed(7)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    mask = (torch.arange(TEXT_TOKENS, device=device)[None] < torch.tensor(VALID, device=device)[:, None]).long()
    return (normal(2, TEXT_TOKENS, config["joint_attention_dim"]), mask, normal(2, config["pooled_projection_dim"]))


def describe(repo, commit):
    """What can be told of a checkout: its commit, and a digest of its sources."""
    if commit is None:
        found = subprocess.run(["git", "-C", repo, "rev-parse", "HEAD"], capture_output=True, text=True)
        top = subprocess.run(["git", "-C", repo, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        same = found.returncode == 0 and top.stdout.strip() == str(repo)
        commit = found.stdout.strip() if same else None
    digest = hashlib.sha256()
    for path in sorted(repo.rglob("*.py")):
        digest.update(str(path.relative_to(repo)).encode() + b"\0" + path.read_bytes())
    return {"name": "jy0205/Pyramid-Flow", "commit": commit, "sources_sha256": digest.hexdigest()}


def header(options):
    """What a result file says of the machine and of the programs."""
    import diffusers
    import transformers
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    gpu = options.device == "cuda"
    driver = subprocess.run(command, capture_output=True, text=True).stdout.strip().split("\n")[0] if gpu else None
    commit = os.environ.get("PYRAFLOW_COMMIT")
    if commit is None:
        git = subprocess.run(["git", "-C", str(pathlib.Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    return {
        "tool": "tools/bench_reference.py", "commit": commit, "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else "CPU", "driver": driver, "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "dtype": "bf16" if gpu else "f32", "family": options.family,
        "weights": "drawn on the device by tools/random_checkpoint.py, seed 1",
        "published": describe(options.repo.resolve(), options.repo_commit) if options.repo else None}


class Published:
    """Builds the published classes."""

    def __init__(self, repo, family, scale, device, dtype):
        self.module, self.family, self.scale = import_published(repo), family, scale
        self.device, self.dtype = device, dtype
        self.configs = configs(family, scale)

    def build(self, component):
        config, make = self.configs[component]
        with torch.device(self.device):
            module = getattr(self, component)(config)
        return fill(module, make, config, self.device, self.dtype)

    def transformer(self, config):
        options = {k: v for k, v in config.items() if not k.startswith("_")}
        if self.family == "miniflux":
            return self.module.PyramidFluxTransformer(**options)
        # What the published pipeline gives besides the configuration.
        options.update(use_t5_mask=True, add_temp_pos_embed=True, temp_pos_embed_type="rope", interp_condition_pos=True)
        return self.module.PyramidDiffusionMMDiT(**options)

    def vae(self, config):
        options = {k: v for k, v in config.items() if not k.startswith("_")}
        vae = self.module.CausalVideoVAE(**options)
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.forward = in_bands(module)
        return vae

    def text(self, config, class_name, config_class):
        import transformers
        config = getattr(transformers, config_class)(**{k: v for k, v in config.items() if k != "architectures"})
        config._attn_implementation = "eager"
        return getattr(transformers, class_name)(config)

    def t5(self, config):
        return self.text(config, "T5EncoderModel", "T5Config")

    def clip_l(self, config):
        return self.text(config, config["architectures"][0], "CLIPTextConfig")

    clip_g = clip_l


class Driver:
    """The published pipeline around a transformer or a VAE."""

    def __init__(self, published, transformer=None, vae=None):
        self.pipeline = pipeline = assemble(published.module, published.family, transformer, vae)
        self.loop, device = type(pipeline).sample_block_noise, published.device
        pipeline.sample_block_noise = types.MethodType(
            lambda p, *shape: block_noise(shape, p.scheduler.config.gamma, device=device), pipeline)
        if transformer is not None:
            give_text(pipeline, *text_inputs(published.configs["transformer"][0], device, published.dtype))

    def generate(self, *settings):
        """Latents, as published_code.generate gives them."""
        return generate(self.pipeline, *settings)

    def loop_seconds(self, height, width):
        """Seconds of the published block noise for one unit."""
        # At gamma 1/3 the covariance is singular, and whether it can be factored is a matter of rounding.
        space = types.SimpleNamespace
        pipeline = space(scheduler=space(config=space(gamma=(1 - 1e-6) / 3)))
        start = time.perf_counter()
        for shrink in (16, 8):
            self.loop(pipeline, 1, 16, 1, height // shrink, width // shrink)
        return time.perf_counter() - start

    def decode(self, latents, save_memory=True):
        """Frames, as the published pipeline makes them: PIL images."""
        return self.pipeline.decode_latent(latents.clone(), save_memory=save_memory)
