"""One of two processes that load a checkpoint together and save it again.

`python -m tests.models.hf_process COORDINATOR ID FROM TO` prints the share of the
checkpoint's numbers that this process has read.
"""

import math
import sys

import jax

import usp_jax
from usp_jax.models import hf
from usp_jax.models.hf.families import LLAMA
from usp_jax.models.hf.files import TensorFiles
from usp_jax.models.hf.names import tensors


def main(coordinator: str, process: str, source: str, target: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(coordinator, 2, int(process))
    numbers = 0
    read = TensorFiles.read

    def counted(files, name, index):
        nonlocal numbers
        x = read(files, name, index)
        numbers += x.size
        return x

    TensorFiles.read = counted
    mesh = usp_jax.make_mesh(fsdp=2, ring=2, ulysses=2)
    model = hf.load(source, mesh=mesh)
    whole = sum(math.prod(tensor.shape) for tensor in tensors(LLAMA, model.config))
    print(numbers / whole)
    hf.save(model, target, file_bytes=50_000)


if __name__ == "__main__":
    main(*sys.argv[1:])
