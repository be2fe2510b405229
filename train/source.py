"""A trained model that a command uses: a run's, or that of a Hugging Face folder."""

import dataclasses
import json
from pathlib import Path

import jax
from jax.sharding import Mesh

import usp_jax
from train.chat_template import TEMPLATE
from train.config import MeshConfig
from train.data.vocabulary import Vocabulary
from train.fake_devices import make_fake_devices, use_cpu_if_alone
from train.mesh import make_mesh
from train.run_dir import TOKENIZER, RunRecord, checkpoint_folders
from train.trained import load_model, model_config, read_run
from usp_jax.mesh import ROLES
from usp_jax.models import hf
from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import Staging, with_fields_of
from usp_jax.models.llama import Llama

# Length in tokens that is assumed where config.json has none.
USUAL_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained model, before its weights are read.

    Attributes:
      path: the folder.
      run: the record of the run; None for a Hugging Face folder.
      step: step of the run's checkpoint; None is the newest.
      config: the model's configuration.
      length: the tokens in a row of the run, or the folder's longest text.
    """

    path: Path
    run: RunRecord | None
    step: int | None
    config: LlamaConfig
    length: int

    @classmethod
    def open(
        cls, path: Path, step: int | None = None, dtype: str | None = None
    ) -> "Source":
        """Reads a folder's configuration.

        Args:
          path: folder of a run of `python -m train`, or of a model in the Hugging Face
            format.
          step: step of the run's checkpoint; None is the newest.
          dtype: dtype of the computation; None is that of the run or of config.json.

        Raises:
          ValueError: it is neither, or its configuration cannot be read.
        """
        content = _content(path)
        if "model_type" in content and not checkpoint_folders(path):
            if step is not None:
                raise ValueError(f"{step=} is for runs: {path} has no checkpoints")
            config = hf.load_config(path, dtype=dtype)
            longest = content.get("max_position_embeddings")
            length = longest if isinstance(longest, int) else USUAL_LENGTH
            return cls(path, None, None, config, length)
        run = read_run(path, step)
        config = model_config(run)
        if dtype is not None:
            config = dataclasses.replace(config, dtype=dtype)
        return cls(path, run, step, config, run["sequence_length"])

    @property
    def folder(self) -> Path | None:
        """The folder with the tokenizer's files, if it is known and exists.

        For a run, that of the initial weights, else of its tokenizer, else its own.
        """
        if self.run is None:
            return self.path
        start, tokenizer = self.run.get("init_from"), self.run["data"]["tokenizer"]
        named = tokenizer_folder(
            None if start is None else Path(start),
            None if tokenizer is None else Path(tokenizer),
        )
        own = tokenizer is not None and (self.path / TOKENIZER).exists()
        return self.path if named is None and own else named

    @property
    def template(self) -> Path | None:
        """The chat template that the run was trained with, if it has its own."""
        own = self.path / TEMPLATE
        return own if self.run is not None and own.exists() else None

    def vocabulary(self) -> Vocabulary:
        """Reads the tokenizer; without one, a run's tokens are bytes.

        Raises:
          ValueError: the tokenizer is missing, or is not the one of the run.
        """
        if self.run is None:
            return Vocabulary.load(self.path / TOKENIZER, "tokenizer")
        name, own = self.run["data"]["tokenizer"], self.path / TOKENIZER
        if name is None:
            return Vocabulary()
        vocabulary = Vocabulary.load(own if own.exists() else Path(name))
        known = self.run["data"].get("tokenizer_fingerprint")
        if known not in (None, vocabulary.fingerprint):
            raise ValueError(
                f"{vocabulary.source} has changed since the run was trained with it"
            )
        return vocabulary

    def load(
        self, mesh: MeshConfig, fake_devices: int | None
    ) -> tuple[int | None, Llama]:
        """Loads the model on a mesh.

        Args:
          mesh: the mesh; if it is of one device, that of the run, or a ring of all
            devices for a Hugging Face folder.
          fake_devices: number of fake CPU devices; None is the run's own, and 0 none.

        Returns:
          The step of the checkpoint, or None, and the model.

        Raises:
          ValueError: the weights cannot be read, or the mesh does not fit.
        """
        if fake_devices is None and self.run is not None:
            fake_devices = self.run["fake_devices"]
        if fake_devices:
            make_fake_devices(fake_devices)
        else:
            use_cpu_if_alone()
        mesh = self._or_own(mesh)
        config = with_fields_of(self.config, mesh, Staging)
        devices = split_over_all(config) if mesh.devices == 1 else make_mesh(mesh)
        if self.run is None:
            return None, hf.load(self.path, mesh=devices, **vars(config))
        return load_model(self.path, self.step, devices, config)

    def _or_own(self, mesh: MeshConfig) -> MeshConfig:
        """The given mesh, or that of the run if none is given and it fits here."""
        count = jax.device_count()
        if mesh.devices == 1 and self.run is not None:
            own = self.run["mesh"]
            names = (*ROLES, "pipe")
            sizes = {name: own[name] for name in names if name in own}
            experts = tuple(own.get("expert_axes", ()))
            trained = MeshConfig(**sizes, expert_axes=experts)
            return trained if trained.devices <= count else mesh
        if mesh.devices > count:
            raise ValueError(
                f"mesh={mesh.sizes} needs {mesh.devices} devices, but there are "
                f"{count}; --fake-devices {mesh.devices} creates them on a CPU"
            )
        return mesh


def tokenizer_folder(start: Path | None, tokenizer: Path | None) -> Path | None:
    """Returns the folder with the files of a run's tokenizer, if there is one.

    Args:
      start: the folder of the initial weights, if the run has one.
      tokenizer: the run's tokenizer.json; None is bytes.
    """
    named = (start, None if tokenizer is None else tokenizer.parent)
    there = (x for x in named if x is not None and (x / TOKENIZER).exists())
    return next(there, None)


def split_over_all(config: LlamaConfig) -> Mesh:
    """A ring of as many devices as the parameters can be split over."""
    count = jax.device_count()
    while config.d_model % count:
        count -= 1
    return usp_jax.make_mesh(ring=count, devices=jax.devices()[:count])


def _content(path: Path) -> dict[str, object]:
    """The content of a folder's config.json, or nothing."""
    if not path.is_dir():
        raise ValueError(
            f"run_dir={path} is neither a run of python -m train nor a folder in the "
            "Hugging Face format: it does not exist"
        )
    try:
        content = json.loads((path / "config.json").read_text())
    # A run without config.json is read from its checkpoints; `read_run` reports others.
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
