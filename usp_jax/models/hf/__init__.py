"""Loads and saves checkpoints in the Hugging Face format, shard by shard.

    from usp_jax.models import hf

    model = hf.load("Llama-3.2-1B", mesh=mesh, dtype="bfloat16")
    hf.save(model, "my-llama", like="Llama-3.2-1B")

A checkpoint is a folder with config.json and safetensors files. `families` has what
distinguishes models; `keys.py` converts config.json, of which `allowed.py` knows every
key, `layers.py` what differs between layers, `parts.py` experts and latent attention,
and `rope.py` the RoPE settings; `names.py` maps tensors, whose places are in
`places.py`, to parameters; `files.py` reads and plans files, and `quantized.py`
dequantizes what is read.
"""

from usp_jax.models.hf.reading import load as load, load_config as load_config
from usp_jax.models.hf.writing import save as save
