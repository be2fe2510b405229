"""Builds the parts of a run from its `Config`, and reports mistakes in it."""

import dataclasses
import json
import math
import platform
from collections.abc import Mapping

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from train.chat_template import TEMPLATE, Chat
from train.check import check
from train.checkpoint import Checkpoints, has_checkpoint
from train.config import Config
from train.data.batches import batches, own_rows
from train.data.passkey import passkey_rows
from train.data.text import Text, cut_report, load_text, shuffled_rows
from train.data.vocabulary import Vocabulary
from train.digests import RECORD
from train.evaluation.held_out import Evaluation
from train.files import write_atomically
from train.log.wandb_run import check_wandb
from train.mesh import make_mesh, memory_of
from train.preferences import dpo_of, with_beta
from train.published import check_published, published_weights
from train.run_dir import TOKENIZER, check_same_run, record
from train.run_lock import RunLock, lock_run_dir
from train.source import tokenizer_folder
from train.state import State, first_state
from usp_jax.command_line import say
from usp_jax.models.llama import Llama
from usp_jax.models.parameters import parameter_shapes, trained
from usp_jax.models.training import DPO
from usp_jax.units import GIB


@dataclasses.dataclass(frozen=True)
class Run:
    """The checked parts of a run.

    Attributes:
      config: the options of the run.
      mesh: the devices that it trains on.
      vocabulary: text to token ids and back.
      data: the iterator over batches; it has its own state.
      evaluation: the evaluation on held-out documents, or None.
      checkpoints: the checkpoints in the run directory.
      graphdef: the model without its parameters.
      dpo: how it learns from pairs of answers, or None.
      state: the state before the first training step.
      lock: the lock of the run directory, until the end of `train`.
    """

    config: Config
    mesh: Mesh
    vocabulary: Vocabulary
    data: grain.DatasetIterator
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    graphdef: nnx.GraphDef[Llama]
    dpo: DPO | None
    state: State
    lock: RunLock


def build(config: Config) -> Run:
    """Reads the text, and creates the model or loads its initial weights.

    Locks the run directory before it writes or removes anything there. The lock is
    held until `train` returns, or until this process ends.

    Raises:
      ValueError: the config is invalid, or the run directory is in use or holds
        another run.
    """
    check(config)
    check_wandb(config.log.wandb)
    mesh = _mesh(config)
    vocabulary = Vocabulary.load(config.data.tokenizer)
    begins = config.init_from is not None and not has_checkpoint(config.run_dir)
    if begins:
        check_published(config, vocabulary)
    if config.model.vocab_size < vocabulary.size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is less than the "
            f"{vocabulary.size} tokens of data.tokenizer={config.data.tokenizer}"
        )
    _check_prompt(config, vocabulary)
    _check_memory(config, mesh)
    text = _text(config, vocabulary)
    config, dpo = with_beta(config, text), None
    if text is None:
        rows = passkey_rows(config)
    else:
        sources = text.rows(config.sequence_length)
        _warn(cut_report(sources))
        dpo = dpo_of(config.dpo, sources)
        rows = shuffled_rows(sources, text.weights, config.seed)
    facts = {} if text is None else text.facts
    lock = _lock(config)
    try:
        checkpoints = _claim_run_dir(config, _record(config, mesh, facts))
        params = published_weights(config, mesh) if begins else None
        graphdef, state = first_state(config, mesh, params)
        return Run(
            config=config,
            mesh=mesh,
            vocabulary=vocabulary,
            data=batches(rows, config.batch_size, own_rows(config.batch_size, mesh)),
            evaluation=Evaluation.of(config, mesh, text, graphdef),
            checkpoints=checkpoints,
            graphdef=graphdef,
            dpo=dpo,
            state=state,
            lock=lock,
        )
    except Exception:
        lock.release()
        raise


def _text(config: Config, vocabulary: Vocabulary) -> Text | None:
    """The text of a run, or None for passkeys."""
    if config.passkey.enabled:
        return None
    try:
        folder = tokenizer_folder(config.init_from, config.data.tokenizer)
        chat = Chat.of(folder, config.data.chat_template)
        return load_text(config.data, vocabulary, chat)
    except ImportError as error:
        raise ValueError(str(error)) from error


def _warn(message: str | None) -> None:
    if message is not None and jax.process_index() == 0:
        say(message, on_stderr=True)


def _check_prompt(config: Config, vocabulary: Vocabulary) -> None:
    """Raises ValueError if the sample at the end of the run would have no tokens."""
    sample = config.sample
    if sample.length and not _encoded(sample.prompt, vocabulary).size:
        raise ValueError(
            f"sample.prompt={sample.prompt!r} has no tokens with {vocabulary.source}: "
            "give another --sample.prompt, or --sample.length 0"
        )


def _encoded(prompt: str, vocabulary: Vocabulary) -> np.ndarray:
    try:
        return vocabulary.encode(prompt.encode(), special=False)
    except ValueError as error:
        raise ValueError(f"sample.prompt={prompt!r}: {error}") from error


def _check_memory(config: Config, mesh: Mesh) -> None:
    """Raises ValueError for a model that all devices together cannot hold."""
    parameters = config.llama.num_parameters
    # The parameters and AdamW's two means; more, where a device holds a copy.
    learnt = sum(map(math.prod, trained(parameter_shapes(config.llama)).values()))
    itemsize = jnp.dtype(config.llama.stored_dtype).itemsize
    needed = (parameters + 2 * learnt) * itemsize
    memory = memory_of(mesh)
    if memory is not None and needed > memory and not config.optimizer.offload:
        raise ValueError(
            f"model.* describes {parameters:,} parameters, which take at least "
            f"{needed / GIB:,.0f} GiB with the optimizer's state, but the devices have "
            f"{memory / GIB:,.0f} GiB: choose smaller sizes"
        )


def _mesh(config: Config) -> Mesh:
    sizes, count = config.mesh.sizes, config.mesh.devices
    if count > jax.device_count():
        raise ValueError(
            f"mesh={sizes} needs {count} devices, but there are {jax.device_count()}; "
            f"--fake-devices {count} creates them on a CPU"
        )
    return make_mesh(config.mesh)


def _record(
    config: Config, mesh: Mesh, facts: Mapping[str, object]
) -> dict[str, object]:
    """The contents of config.json for this run."""
    environment = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "processes": jax.process_count(),
    }
    return record(config, data=facts, environment=environment)


def _lock(config: Config) -> RunLock:
    try:
        return lock_run_dir(config.run_dir)
    except OSError as error:
        raise _unwritable(config, error) from error


def _claim_run_dir(config: Config, wanted: dict[str, object]) -> Checkpoints:
    """Writes config.json, unless the directory or a checkpoint is of another run."""
    check_same_run(config.run_dir, wanted)
    folder = config.run_dir / "checkpoints"
    try:
        checkpoints = Checkpoints(folder, config.checkpoint, wanted)
    except OSError as error:
        raise _unwritable(config, error) from error
    done = checkpoints.newest() or 0
    if done > config.steps:
        raise ValueError(
            f"run_dir={config.run_dir} has already done {done} steps, more than "
            f"steps={config.steps}: give a larger --steps, or another --run-dir"
        )
    # Every process has compared before process 0 overwrites the file.
    multihost_utils.sync_global_devices("run directory is compared")
    if jax.process_index() == 0:
        try:
            text = json.dumps(wanted, indent=2) + "\n"
            write_atomically(config.run_dir / RECORD, text)
            if config.data.tokenizer is not None:
                # For the commands that use the model, wherever they run.
                own = config.data.tokenizer.read_text(encoding="utf-8")
                write_atomically(config.run_dir / TOKENIZER, own)
            if config.data.chat_template is not None:
                own = config.data.chat_template.read_text(encoding="utf-8")
                write_atomically(config.run_dir / TEMPLATE, own)
        except OSError as error:
            raise _unwritable(config, error) from error
    return checkpoints


def _unwritable(config: Config, error: OSError) -> ValueError:
    return ValueError(
        f"run_dir={config.run_dir} cannot be written to: {error}; nothing in it has "
        "changed: make it writable, or give another --run-dir"
    )
