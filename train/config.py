"""What a run is: one frozen, typed dataclass with a section for each subject.

A preset (`presets.py`) is a function that returns a `Config`; the command line replaces
fields of it, and `check.py` says what is wrong with one.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from usp_jax.layout import LAYOUTS
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import Decoder
from usp_jax.models.execution import Computation, MeshSizes, Staging, with_fields_of
from usp_jax.models.optimizer import AdamW
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.training import Training

# "balanced" is the op's "data": each row has an order of its own.
STORED_LAYOUTS = tuple(name if name != "data" else "balanced" for name in LAYOUTS)
HERE = "here"


@dataclasses.dataclass(frozen=True)
class MeshConfig(Staging, MeshSizes):
    """Devices along each axis of the mesh, outermost first, and how they are used."""


@dataclasses.dataclass(frozen=True)
class ModelConfig(Computation, Decoder):
    """Sizes of the LLaMA, and how a device computes its part of it."""


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
class OptimizerConfig(AdamW):
    """AdamW, warm-up and cosine.

    Attributes:
      max_skipped: a step whose loss or gradient is not finite changes nothing; after
        this many in a row the run gives up.
    """

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
        planner then chooses mesh.*, accumulate and, of model.*, the fields of
        `usp_jax.models.execution.Tuning`.
      dtype: dtype of the computation: float32, bfloat16 or float64 (which needs
        JAX_ENABLE_X64=1); model.param_dtype is that of the stored parameters.
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
        config = LlamaConfig(**vars(self.model), dtype=self.dtype)
        return with_fields_of(config, self.mesh, Staging)

    @property
    def training(self) -> Training:
        """What a step of the run is, beside its model and mesh."""
        return Training(self.optimizer, self.steps, self.accumulate, self.stored_layout)

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
