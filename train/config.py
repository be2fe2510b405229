"""The options of a run: one frozen, typed dataclass with a section for each subject.

A preset (`presets.py`) is a function that returns a `Config`; the command line replaces
its fields, and `check.py` validates it.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tyro

from usp_jax.layout import LAYOUTS
from usp_jax.models.adapters import Lora
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import DEFAULT, Decoder, Variant
from usp_jax.models.delta import Delta
from usp_jax.models.execution import Computation, MeshSizes, Staging, with_fields_of
from usp_jax.models.experts import Experts
from usp_jax.models.latent import Latent
from usp_jax.models.optimizer import AdamW
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.training import Router, Training

# "balanced" is called "data" in the op: each row has its own order.
STORED_LAYOUTS = tuple(name if name != "data" else "balanced" for name in LAYOUTS)
HERE = "here"
CONTINUED_LEARNING_RATE = 1e-5
"""Learning rate of a run that starts from trained weights, unless it is given."""
DPO_BETA = 0.1
"""`dpo.beta` of pairs of answers, unless it is given."""
LORA_LEARNING_RATE = 2e-4
"""The same for adapters, which start at 0; QLoRA's at 7B and 13B (arXiv 2305.14314)."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(Staging, MeshSizes):
    """Devices along each mesh axis, outermost first, and how they are used."""


@dataclasses.dataclass(frozen=True)
class ModelConfig(Computation, Decoder):
    """Sizes of the model, and how each device computes its part."""

    # The model that the command line names has them; they are not options.
    layer_types: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = (
        DEFAULT,
    )
    variants: Annotated[tuple[Variant, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    experts: Annotated[Experts | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    latent: Annotated[Latent | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    delta: Annotated[Delta | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    # Of the section `lora`.
    lora: Annotated[Lora | None, tyro.conf.Fixed, tyro.conf.Suppress] = None


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Training of adapters only (LoRA); the weights of `init_from` are frozen.

    Attributes:
      rank: size of the dim between an adapter's two matrices; None trains all
        parameters.
      alpha: the products of adapters are multiplied by alpha / rank; None is 2 · rank.
      targets: names of the matrices that have adapters, such as `q v down`; none is all
        of attention and feed-forward networks.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()

    @property
    def adapters(self) -> Lora | None:
        """The adapters, or None."""
        if self.rank is None:
            return None
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return Lora(self.rank, alpha, self.targets)


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimization, for data that are pairs of answers.

    Attributes:
      beta: strength of the pull towards the reference, which is the model without its
        adapters, or else a frozen copy of the initial weights; None is 0.1 for pairs.
    """

    beta: float | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training text.

    Attributes:
      path: a text file, which is one document; a .jsonl or .parquet file; a folder of
        such files, all of which are read; or a folder written by `python -m
        train.tokenize`. None uses the source of Python's standard library.
      mixture: several paths to use instead of `path`, each with the weight with which
        its rows are drawn: `--data.mixture code/ 0.7 prose.jsonl 0.3`.
      tokenizer: a tokenizer.json, which also sizes a preset's vocabulary unless
        model.vocab_size is given; None uses bytes as tokens.
      text_field: the JSON field or Parquet column that holds the text.
      form: what the lines of .jsonl files hold: "text"; "messages", conversations whose
        answers are learnt; "completion", a `prompt` and the `completion` that is
        learnt; or "pairs", a `prompt`, a `chosen` and a `rejected` answer, for DPO.
        None chooses by the fields of the first line.
      chat_template: file with the chat template of conversations, in Jinja; None is the
        one next to the tokenizer.
      eval_fraction: fraction of the documents held out from training for evaluation.
      across_documents: let tokens attend to all earlier tokens of their row, those of
        other documents too. Rows then have no segment ids, as kernels that support no
        packed rows need it.
    """

    path: Path | None = None
    mixture: tuple[tuple[Path, float], ...] = ()
    tokenizer: Path | None = None
    text_field: str = "text"
    form: str | None = None
    chat_template: Path | None = None
    eval_fraction: float = 0.0
    across_documents: bool = False


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the loss on held-out documents, see `data.eval_fraction`.

    Attributes:
      every: steps between evaluations, in addition to one at the end; None disables
        evaluation.
      batches: number of held-out batches to evaluate, the same each time.
    """

    every: int | None = None
    batches: int = 8


@dataclasses.dataclass(frozen=True)
class PasskeyConfig:
    """A synthetic retrieval task that replaces the text, see `data/passkey.py`.

    Attributes:
      enabled: train on passkey documents instead of text.
      shortest: minimum number of tokens in a document.
      growth_rows: number of rows over which the longest document grows from `shortest`
        to a whole row; 0 starts with whole rows.
    """

    enabled: bool = False
    shortest: int = 64
    growth_rows: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(AdamW):
    """AdamW with warm-up and cosine decay.

    Attributes:
      max_skipped: number of consecutive steps without a finite loss and gradient after
        which the run gives up. Such a step changes nothing.
    """

    max_skipped: int = 10


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to write checkpoints, in addition to those at the end and at SIGTERM.

    Attributes:
      every: steps between checkpoints.
      every_minutes: also write a checkpoint after this many minutes without one; with
        several processes, they then wait for each other at each step.
      keep: number of newest checkpoints to keep.
      keep_period: also keep the checkpoints of steps that are a multiple of this.
      keep_minutes: also keep one checkpoint for each interval of this many minutes.
      stopped_status: exit status after SIGTERM. Use a nonzero one with schedulers that
        restart a program only after a failure, as Kubernetes does.
    """

    every: int = 100
    every_minutes: float | None = None
    keep: int = 2
    keep_period: int | None = None
    keep_minutes: float | None = None
    stopped_status: int = 0


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is logged and printed.

    Attributes:
      every: steps between rows of metrics.jsonl.
      print_every: steps between printed lines when the output is not a terminal.
      spike_factor: a loss is a spike when it is more than this many median absolute
        deviations above the median of the last `spike_window` losses.
      spike_window: number of last losses that a spike is measured against.
      watchdog_seconds: report a step that takes longer, and the processes that it
        waits for; at least 0.1, and 0 disables the watchdog.
      wandb: Weights & Biases project to log to as well.
    """

    every: int = 1
    print_every: int = 20
    spike_factor: float = 10.0
    spike_window: int = 50
    watchdog_seconds: float = 600.0
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Profiling of devices and host in some steps, for XProf.

    Attributes:
      steps: steps to trace into the run directory's `profile` folder: "10:13" traces
        steps 10, 11 and 12.
    """

    steps: str | None = None

    @property
    def traced(self) -> range:
        """The steps to trace.

        Raises:
          ValueError: `steps` is not a range of steps.
        """
        if self.steps is None:
            return range(0)
        match = re.fullmatch(r"(\d+):(\d+)", self.steps)
        steps = range(*map(int, match.groups())) if match else range(0)
        if not steps or steps[0] < 1:
            raise ValueError(
                f"profile.steps={self.steps!r} must be FIRST:END with 1 <= FIRST < "
                "END, such as 10:13 for steps 10, 11 and 12"
            )
        return steps


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text that the trained model generates at the end.

    Attributes:
      prompt: text that the sample begins with.
      length: number of tokens to generate; 0 for no sample.
      temperature: sampling temperature; 0 takes the most likely token.
    """

    prompt: str = "def "
    length: int = 200
    temperature: float = 0.7


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Training with several processes.

    Attributes:
      coordinator: host:port of process 0; "auto" reads the environment of a cluster,
        such as SLURM's, a TPU pod's or JAX_COORDINATOR_ADDRESS; None is one process.
      num_processes: number of processes; needed with host:port.
      process_id: number of this process, from 0; needed with host:port.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """The options of a run.

    Attributes:
      steps: number of optimizer steps, after which the run is complete.
      sequence_length: tokens in a row.
      batch_size: rows in a step, over all devices.
      accumulate: number of sequential parts into which a step divides its rows. Their
        gradients are summed, and activations take the memory of one part.
      layout: the order in which a row is stored on the mesh: "zigzag", "striped",
        or "contiguous"; "balanced" orders each row so that its documents are equal work
        for every device of the ring.
      seed: seed of the initial parameters and of the order of the data, below 2**32.
      run_dir: folder of the run; a run that is already there is resumed.
      init_from: a folder in the Hugging Face format with the initial weights, which
        also sets the model's sizes; unless the learning rate is given, it is then 1e-5,
        or 2e-4 with `lora.rank`. None draws random weights.
      fake_devices: use this many fake CPU devices in each process.
      auto_mesh: a machine of `usp_jax.plan`, or "here" for this machine; the planner
        then chooses mesh.*, accumulate and, of model.*, remat, mlp_tile and the other
        fields of `usp_jax.models.execution.Tuning`.
      dtype: dtype of the computation: float32, bfloat16 or float64 (which needs
        JAX_ENABLE_X64=1). See model.param_dtype for the stored parameters.
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
    lora: LoraConfig = LoraConfig()
    dpo: DpoConfig = DpoConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    passkey: PasskeyConfig = PasskeyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    router: Router = Router()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    sample: SampleConfig = SampleConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def stored_layout(self) -> str:
        """The model's name for `layout`."""
        return "data" if self.layout == "balanced" else self.layout

    @property
    def llama(self) -> LlamaConfig:
        """The model's configuration; raises ValueError for invalid sizes."""
        fields = {**vars(self.model), "lora": self.lora.adapters}
        config = LlamaConfig(**fields, dtype=self.dtype)
        return with_fields_of(config, self.mesh, Staging)

    @property
    def training(self) -> Training:
        """The parts of a training step other than its model and mesh."""
        return Training(
            self.optimizer,
            self.steps,
            self.accumulate,
            self.stored_layout,
            self.router,
        )

    @property
    def pipeline(self) -> Pipeline:
        """The schedule of the pipeline's stages; raises ValueError if impossible."""
        return Pipeline.of(self.llama, self.mesh.pipe)


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flattens a nested dict into one with dotted names."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
