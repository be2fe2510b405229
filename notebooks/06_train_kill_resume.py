# %% [markdown]
# # 6. Train, kill, resume on another mesh, generate
#
# Long runs get interrupted: a machine fails, a job is preempted, next week there are
# fewer devices. A training run here is a folder. Run the same command again and it
# resumes from its newest checkpoint, **on whatever mesh you give it**, as if nothing
# had happened.
#
# We train a very small LLaMA three times: once without interruption, once until we
# kill it, and once resuming that run on another mesh. The losses must be the same.

# %%
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import usp_jax

plt.style.use("petroff10")
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

CHECKOUT = Path(usp_jax.__file__).parent.parent
folder = tempfile.TemporaryDirectory()
FOLDER = Path(folder.name)

# %% [markdown]
# ## The text
#
# Here is something that a very small model can learn in a minute: sums.

# %%
draw = random.Random(0)
lines = []
for _ in range(4000):
    a, b = draw.randrange(10), draw.randrange(10)
    lines.append(f"{a} + {b} = {a + b}.")
text = "\n".join(lines)
(FOLDER / "sums.txt").write_text(text)
print(text[:40], "...")

# %% [markdown]
# ## The command
#
# `python -m train PRESET` trains a preset; options replace its values. We take the
# preset `tiny` and make everything smaller. `--fake-devices 8` creates eight CPU
# devices in that process; on a real machine give `--fake-devices None`.

# %%
STEPS = 60
OPTIONS = {
    "model.d-model": 64,
    "model.num-layers": 2,
    "model.num-heads": 4,
    "model.num-kv-heads": 2,
    "model.d-ff": 128,
    "sequence-length": 128,
    "batch-size": 8,
    "steps": STEPS,
    "data.path": FOLDER / "sums.txt",
    "optimizer.learning-rate": 0.01,
    "optimizer.warmup-steps": 10,
    "checkpoint.every": 10,
    "sample.prompt": "2 + 2 =",
    "sample.length": 60,
    "sample.temperature": 0.3,
}


def command(run, devices, **mesh):
    """The command line of a run of this name on a mesh."""
    options = OPTIONS | {"run-dir": FOLDER / run, "fake-devices": devices}
    options |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    pairs = (x for name, value in options.items() for x in (f"--{name}", str(value)))
    return [sys.executable, "-m", "train", "tiny", *pairs]


def start(run, devices, **mesh):
    # Programs are compiled once and cached for the next run.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(FOLDER / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command(run, devices, **mesh),
        cwd=CHECKOUT,
        env=os.environ | cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """Waits for a run that must succeed; returns what it printed."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def losses(run):
    """The loss after each step that the run has logged."""
    path = FOLDER / run / "metrics.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return {row["step"]: row["loss"] for row in rows}


# %% [markdown]
# ## A run without interruption
#
# On eight devices, `ring=4` × `ulysses=2`.

# %%
result = finish(start("whole", 8, ring=4, ulysses=2))
whole = losses("whole")
assert list(whole) == list(range(1, STEPS + 1))
print(f"loss {whole[1]:.2f} after one step, {whole[STEPS]:.2f} after {STEPS}")
assert whole[STEPS] < whole[1] / 3

# %% [markdown]
# ## Kill it
#
# Here is the same run again, in another folder. As soon as it has logged step 27 it
# gets SIGKILL, which no program can catch: it dies at once, whatever it is doing.

# %%
process = start("killed", 8, ring=4, ulysses=2)
while max(losses("killed"), default=0) < 27:
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.002)
process.kill()
process.communicate()
killed = losses("killed")

print(f"ended with {process.returncode}, the last row is step {max(killed)}")
assert process.returncode == -9 and max(killed) < STEPS

# %% [markdown]
# ## Resume on another mesh
#
# Now there are four devices, in a different mesh: `data=2`, so that each half takes
# half of the rows, and `ring=2`. The checkpoint was written from eight devices in
# another arrangement; each device reads the parts that it needs now.

# %%
result = finish(start("killed", 4, data=2, ring=2, ulysses=1))
resumed = losses("killed")
message = next(line for line in result.splitlines() if "resuming" in line)
restored = int(message.split()[-1])
print(message)
assert 0 < restored <= max(killed) and restored % 10 == 0
assert list(resumed) == list(range(1, STEPS + 1))

# %% [markdown]
# Steps after the checkpoint were computed again; their old rows were removed from
# `metrics.jsonl`, so no step is logged twice. Up to the checkpoint the losses are
# equal to the last bit. After it they come from another mesh, which adds numbers in
# another order, and agree to the precision of float32. In the lower plot a difference
# of exactly 0 is drawn at $10^{-9}$.

# %%
steps = np.arange(1, STEPS + 1)
expected = np.array([whole[s] for s in steps])
actual = np.array([resumed[s] for s in steps])
difference = abs(actual / expected - 1)

assert (difference[:restored] == 0).all()
assert difference.max() < 1e-4
print(f"largest relative difference after the restart: {difference.max():.0e}")


# %%
def draw_losses():
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5), sharex=True, height_ratios=(2, 1)
    )
    before, after = steps <= restored, steps > restored
    top.plot(steps, expected, color="0.6", linewidth=5, label="never killed, 8 devices")
    top.plot(steps[before], actual[before], ".", color="C0", label="8 devices …")
    lost = [step for step in killed if step > restored]
    top.plot(
        lost, [killed[s] for s in lost], "x", color="C2", label="lost with the kill"
    )
    top.plot(steps[after], actual[after], ".", color="C1", label="… then 4 devices")
    top.set_ylabel("loss, nats a byte")
    top.legend()
    bottom.semilogy(steps[after], np.maximum(difference[after], 1e-9), ".", color="C1")
    bottom.set(xlabel="step", ylabel="relative difference", xlim=(0, STEPS + 1))
    for axes in (top, bottom):
        axes.axvline(restored + 0.5, color="black", linestyle=":")


draw_losses()

# %% [markdown]
# ## What it has learnt
#
# A run ends with a sample from the trained model. The prompt was `2 + 2 =`.

# %%
sample = result.partition("a sample from the trained model:\n")[2].strip()
print(sample)
assert sample.startswith("2 + 2 =")

# %% [markdown]
# It has learnt what a line of the text looks like. To get the sums right is asking a
# lot of 60 steps; train it longer and see.

# %%
folder.cleanup()

# %% [markdown]
# The same works on real machines: at SIGTERM, which schedulers send before they take a
# machine away, the trainer writes a checkpoint and exits with code 0. So no step is
# lost, and the scheduler restarts the same command.
