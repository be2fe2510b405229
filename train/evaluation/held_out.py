"""The loss on held-out documents, or pairs of answers."""

import dataclasses
from itertools import islice

import grain
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from train.config import Config
from train.data.batches import batches, own_rows, place
from train.data.text import Text, shuffled_rows
from train.log.rows import Evaluated
from train.preferences import dpo_of
from train.state import Params, on_devices
from train.step import objective_of
from usp_jax.models.llama import Llama
from usp_jax.models.objectives import DPO_METRICS, Objective, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Evaluation on the same held-out batches each time.

    Attributes:
      config: the options of the run.
      mesh: the mesh of the run.
      rows: the held-out rows, endless.
      count: number of batches to evaluate.
      objective: the sums of a training step.
    """

    config: Config
    mesh: Mesh
    rows: grain.MapDataset
    count: int
    objective: Objective

    @classmethod
    def of(
        cls,
        config: Config,
        mesh: Mesh,
        text: Text | None,
        graphdef: nnx.GraphDef[Llama],
    ) -> "Evaluation | None":
        """The evaluation of a run, or None if no documents are held out."""
        if text is None or not text.held_out:
            return None
        sources = text.held_out_rows(config.sequence_length)
        there = sum(map(len, sources))
        count = min(config.eval.batches, -(-there // config.batch_size))
        rows = shuffled_rows(sources, text.weights, config.seed)
        dpo = dpo_of(config.dpo, sources)
        objective = jax.jit(objective_of(graphdef, config.stored_layout, dpo))
        return cls(config, mesh, rows, count, objective)

    def due(self, step: int) -> bool:
        """Returns True if an evaluation is due after this training step."""
        every = self.config.eval.every
        is_due = every is not None and step % every == 0
        return is_due or step == self.config.steps

    def __call__(self, params: Params, reference: Params | None = None) -> Evaluated:
        """Returns the mean nats of a held-out label, and the perplexity.

        Of pairs, it returns the means of their losses, accuracies and margins.

        Args:
          params: the model's parameters.
          reference: those of DPO's reference, if it is not the model without adapters.
        """
        config = self.config
        params = on_devices(params, config, self.mesh)
        if reference is not None:
            reference = on_devices(reference, config, self.mesh)
        own = own_rows(config.batch_size, self.mesh)
        data = batches(self.rows, config.batch_size, own)
        results: list[Sums] = [
            self.objective(params, place(batch, config.layout, self.mesh), reference)
            for batch in islice(data, self.count)
        ]
        results = jax.device_get(results)
        number = max(sum(int(x.number) for x in results), 1)
        loss = sum(float(x.loss) for x in results) / number
        if config.dpo.beta is None:
            return Evaluated(eval_loss=loss, eval_perplexity=float(np.exp(loss)))
        accuracy, margin = (
            sum(float(x.others[name]) for x in results) / number for name in DPO_METRICS
        )
        return Evaluated(eval_loss=loss, eval_accuracy=accuracy, eval_margin=margin)
