"""What a run is: one frozen, typed dataclass with a section for each subject.

A preset (`presets.py`) is a function that returns a `Config`; the command line replaces
fields of it, and `check.py` says what is wrong with one.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

from usp_jax.layout import LAYOUTS
from usp_jax.mesh import ROLES
from usp_jax.models.llama import LlamaConfig, RopeScaling
from usp_jax.models.pipeline import Pipeline

# "balanced" is the op's "data": each row has an order of its own.
STORED_LAYOUTS = tuple(name if name != "data" else "balanced" for name in LAYOUTS)
DTYPES = ("float32", "bfloat16")
HERE = "here"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh, outermost first.

    Attributes:
      pipe: splits the layers into stages, which work on micro-batches of the rows one
        behind the other.
      data: splits the batch; optimizer state is split too (ZeRO-1).
      fsdp: splits the batch, parameters, gradients and optimizer state (ZeRO-3).
      ring: splits the sequence, by ring attention.
      ulysses: splits the sequence, by all-to-all.
      tensor: splits heads and the feed-forward network.
      zero: the ZeRO level over fsdp, ring and ulysses: 3 splits parameters and
        gradients too, 1 optimizer state only.
      microbatches: in how many parts a device's rows go through the stages; None is
        one for each stage, more leave the stages less idle.
      interleave: groups of layers that a stage has; more leave it less idle too.
    """

    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    zero: int = 3
    microbatches: int | None = None
    interleave: int = 1

    @property
    def axes(self) -> dict[str, int]:
        """The size of each axis."""
        return {name: getattr(self, name) for name in ROLES}

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.axes.values())


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of the LLaMA, as `usp_jax.models.llama.LlamaConfig` has them.

    Attributes:
      rope_scaling: a stretching of RoPE for longer contexts; the command line takes it
        last: `model.rope-scaling:linear-scaling --model.rope-scaling.factor 4`.
      remat: what the backward pass computes again: none, full, attention (attention's
        output is kept), attention_qkv (its inputs too) or dots (what all other matrix
        products give, too); full_offload, attention_offload, attention_qkv_offload and
        dots_offload keep it all in the host's memory.
      mlp_tile: how many of a device's tokens have the feed-forward network's hidden
        activations in memory at once; None: all.
      loss_chunk: how many of a device's tokens, and
      loss_block: how many of the vocabulary's entries have logits in memory at once.
      tensor_sequence: with mesh.tensor, splits over it by tokens what is not split by
        heads or features (TP-sp).
      implementation: of attention; None is the platform's own.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    d_ff: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    remat: str = "full"
    mlp_tile: int | None = None
    loss_chunk: int = 1024
    loss_block: int = 8192
    tensor_sequence: bool = True
    implementation: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text.

    Attributes:
      path: a text file, which is one document; a .jsonl or .parquet file; a folder of
        such files, all of which are read; or a folder that `python -m train.tokenize`
        wrote. None is the source text of the running Python's standard library.
      mixture: several of these instead of `path`, each with the weight by which rows
        are drawn from it: `--data.mixture code/ 0.7 prose.jsonl 0.3`.
      tokenizer: a tokenizer.json; None takes bytes as tokens.
      text_field: what holds the text in JSON lines, and the column of Parquet.
      eval_fraction: of the documents, which are not learnt from: `eval` uses them.
    """

    path: Path | None = None
    mixture: tuple[tuple[Path, float], ...] = ()
    tokenizer: Path | None = None
    text_field: str = "text"
    eval_fraction: float = 0.0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The loss of documents that are not learnt from, see `data.eval_fraction`.

    Attributes:
      every: steps between two evaluations, beside the one at the end; None for none.
      batches: how many batches of held-out rows are looked at, the same each time.
    """

    every: int | None = None
    batches: int = 8


@dataclasses.dataclass(frozen=True)
class PasskeyConfig:
    """A task that is made up, instead of text: see `data/passkey.py`.

    Attributes:
      enabled: trains on it, and on no text.
      shortest: tokens of a document, at the least.
      growth_rows: the number of rows in which the longest document grows from
        `shortest` to a whole row; 0 begins with whole rows.
    """

    enabled: bool = False
    shortest: int = 64
    growth_rows: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, warm-up and cosine.

    Attributes:
      learning_rate: the highest, reached after `warmup_steps`.
      final_fraction: of it, reached with the last step.
      weight_decay: of everything but norms and biases.
      clip_norm: the longest that the gradient of all parameters may be.
      offload: the float32 parameters and the optimizer's memory live in the host's
        pinned memory, and pass through the device a layer at a time.
      max_skipped: a step whose loss or gradient is not finite changes nothing; after
        this many in a row the run gives up.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    offload: bool = False
    max_skipped: int = 10


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, beside the one at the end and the one at SIGTERM.

    Attributes:
      every: steps between two.
      every_minutes: after so many minutes without one there is one too; several
        processes then wait for each other at each step.
      keep: how many of the newest stay.
      keep_period: of the others, those of steps that are a multiple of this stay too.
      keep_minutes: and one in each so many minutes.
      stopped_status: the program's exit status after SIGTERM: 0, unless whoever starts
        it again, as Kubernetes does, does so only after a failure.
    """

    every: int = 100
    every_minutes: float | None = None
    keep: int = 2
    keep_period: int | None = None
    keep_minutes: float | None = None
    stopped_status: int = 0


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is told of the steps.

    Attributes:
      every: steps between two rows of metrics.jsonl.
      print_every: steps between two printed lines, where there is no terminal.
      spike_factor: a loss is a spike when it is more than this many median absolute
        deviations above the median of the last `spike_window` losses.
      watchdog_seconds: a step that takes longer is told of, with the processes that
        it waits for; 0 watches nothing.
      wandb: the Weights & Biases project that gets the rows too.
    """

    every: int = 1
    print_every: int = 20
    spike_factor: float = 10.0
    spike_window: int = 50
    watchdog_seconds: float = 600.0
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace of what devices and host do in some steps, for XProf.

    Attributes:
      steps: "10:13" traces steps 10, 11 and 12, into the run directory's `profile`.
    """

    steps: str | None = None

    @property
    def traced(self) -> range:
        """The steps to trace.

        Raises:
          ValueError: `steps` is no range of steps.
        """
        if self.steps is None:
            return range(0)
        match = re.fullmatch(r"(\d+):(\d+)", self.steps)
        found = range(*map(int, match.groups())) if match else range(0)
        if not found or found[0] < 1:
            raise ValueError(
                f"profile.steps={self.steps!r} must be FIRST:END with 1 <= FIRST < "
                "END, as 10:13 for steps 10, 11 and 12"
            )
        return found


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text that the trained model writes at the end.

    Attributes:
      prompt: how it begins.
      length: tokens that the model adds; 0 for no sample.
      temperature: 0 takes the likeliest token.
    """

    prompt: str = "def "
    length: int = 200
    temperature: float = 0.7


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train together.

    Attributes:
      coordinator: host:port of process 0; "auto" reads the cluster's environment
        (SLURM, TPU pods, JAX_COORDINATOR_ADDRESS and its like); None is one process.
      num_processes, process_id: needed with host:port.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """A run.

    Attributes:
      steps: of the optimizer, after which the run is complete.
      sequence_length: tokens of a row.
      batch_size: rows of a step, over all devices.
      accumulate: in how many parts, one after the other, a step takes its rows; the
        gradients are added up, and memory for activations is that of one part.
      layout: the order in which a row is stored on the mesh; "balanced" gives each row
        the order in which its documents are equal work for all of the ring.
      seed: of the first parameters and of the order of the data.
      run_dir: where the run is kept; a run that is there already goes on.
      init_from: a folder in the Hugging Face format with the weights that the run
        begins with; None draws them. The model's sizes are then the folder's.
      fake_devices: this many CPU devices in each process, instead of what there is.
      auto_mesh: a machine of `usp_jax.plan`, or "here" for that of the devices; the
        planner then chooses mesh.*, model.remat, model.mlp_tile,
        model.tensor_sequence and accumulate.
      dtype: of the computation; parameters are float32.
    """

    model: ModelConfig
    steps: int
    sequence_length: int
    batch_size: int
    run_dir: Path
    layout: str = "zigzag"
    seed: int = 0
    init_from: Path | None = None
    accumulate: int = 1
    fake_devices: int | None = None
    auto_mesh: str | None = None
    dtype: str = "bfloat16"
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    passkey: PasskeyConfig = PasskeyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    sample: SampleConfig = SampleConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def stored_layout(self) -> str:
        """What the model calls `layout`."""
        return "data" if self.layout == "balanced" else self.layout

    @property
    def llama(self) -> LlamaConfig:
        """The model's configuration; raises ValueError for sizes it cannot have."""
        return LlamaConfig(
            **vars(self.model),
            dtype=self.dtype,
            zero=self.mesh.zero,
            microbatches=self.mesh.microbatches,
            interleave=self.mesh.interleave,
        )

    @property
    def pipeline(self) -> Pipeline:
        """The schedule of the stages; raises ValueError for one there cannot be."""
        return Pipeline.of(self.llama, self.mesh.pipe)


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A nested dict as one with dotted names."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
