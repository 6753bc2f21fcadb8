"""Reading checkpoint folders: safetensors (also sharded with an index) and PyTorch `.bin` files."""

import json
import pathlib

import torch
from safetensors.torch import load_file


def read_config(folder):
    return json.loads((pathlib.Path(folder) / "config.json").read_text())


def read_tensors(folder):
    """All tensors of a component folder as f32, by name. Raises FileNotFoundError when there are none."""
    folder = pathlib.Path(folder)
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index:
        tensors = {}
        names = json.loads(index.read_text())["weight_map"]
        for shard in sorted(set(names.values())):
            loaded = load_file(folder / shard)
            tensors.update({name: loaded[name] for name, home in names.items() if home == shard})
    else:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        if not files:
            raise FileNotFoundError(f"no safetensors or .bin file in {folder}")
        one = files[0]
        tensors = load_file(one) if one.suffix == ".safetensors" else torch.load(one, weights_only=True)
    return {name: tensor.float() for name, tensor in tensors.items()}


def load_into(module, folder):
    """Fill a module from a component folder. Every parameter must be there; extra tensors are an error too."""
    module.load_state_dict(read_tensors(folder), strict=True)
    return module.eval()
