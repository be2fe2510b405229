"""Runs are started, stopped and restarted as each kind of cluster does."""

import dataclasses
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.train import hosts, slurm
from tests.train.runs import (
    ROOT,
    finish,
    losses,
    options,
    run_here,
    small_config,
    start,
)
from train.cli import parse
from train.config import CheckpointConfig, Config, MeshConfig
from train.launch.one_host import Host

LAUNCH = ROOT / "train" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
JOBSETS = sorted(LAUNCH.glob("jobset_*.yaml"))


def fast_config(tmp_path: Path, **changes) -> Config:
    """A run of two processes that compiles in seconds and steps fast."""
    config = small_config(
        tmp_path,
        mesh=MeshConfig(ring=2),
        checkpoint=CheckpointConfig(every=20),
        fake_devices=1,
        steps=300,
        **changes,
    )
    model = dataclasses.replace(config.model, num_layers=1)
    return dataclasses.replace(config, model=model)


def without_distributed(config: Config) -> list[str]:
    """The options of a run whose launcher adds those of the distributed setup."""
    found, kept = iter(options(config)), []
    for name in found:
        if name.startswith(("--distributed", "--checkpoint.stopped")):
            next(found)
        else:
            kept.append(name)
    return kept


def wait_until(happened: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def check_whole(config: Config, tmp_path: Path) -> None:
    """Checks that the losses are those of an uninterrupted run."""
    whole = dataclasses.replace(config, run_dir=tmp_path / "whole", fake_devices=None)
    run_here(whole)
    actual, expected = losses(config.run_dir), losses(whole.run_dir)
    assert [step for step, _ in actual] == [step for step, _ in expected]
    assert [loss for _, loss in actual] == pytest.approx(
        [loss for _, loss in expected], rel=1e-6
    )


def fake_program(folder: Path, name: str, body: str) -> None:
    """A fake of a cluster's program."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run_script(
    script: str, *arguments: str, path: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script with `path` first in PATH."""
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", str(script)], check=True)
    assert script.stat().st_mode & stat.S_IXUSR


class TestOneHost:
    def test_each_process_has_its_place_and_its_devices(self) -> None:
        host = Host(2, 4, ["tiny", "--steps", "3"])
        (first, more), (second, others) = host.commands(1234)
        assert first[:5] == [sys.executable, "-m", "train", "tiny", "--steps"]
        config = parse(second[3:]).distributed
        assert vars(config) == {
            "coordinator": "localhost:1234",
            "num_processes": 2,
            "process_id": 1,
        }
        assert more == {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}
        assert others == {"JAX_LOCAL_DEVICE_IDS": "4,5,6,7"}
        assert Host(1, None, ["tiny"]).commands(1) == [
            ([sys.executable, "-m", "train", "tiny"], {})
        ]

    @pytest.mark.parametrize("arguments", [[], ["-n", "0", "tiny"], ["-n", "a", "t"]])
    def test_mistakes_are_reported(self, arguments: list[str]) -> None:
        with launch(arguments) as done:
            printed = finished(done)
        assert done.returncode == 2 and "error: " in printed

    def test_a_mistake_in_the_run_is_not_tried_again(self) -> None:
        with launch(["tiny", "--steps", "0"]) as done:
            printed = finished(done)
        assert done.returncode == 2
        assert printed.count("steps=0 must be positive") == 1
        assert "restarts" not in printed

    @pytest.mark.long
    def test_a_killed_process_is_started_again_with_the_others(
        self, tmp_path: Path
    ) -> None:
        config = fast_config(tmp_path)
        run = ["-n", "2", "tiny", *without_distributed(config)]
        with launch(run) as launcher:
            checkpoints = config.run_dir / "checkpoints"
            wait_until(
                lambda: any(path.name.isdigit() for path in checkpoints.glob("*")),
                lambda: "no checkpoint",
            )
            os.kill(children(launcher.pid)[1], signal.SIGKILL)
            printed = finished(launcher)
        assert launcher.returncode == 0, printed
        assert "10 restarts left" in printed and "resuming from step" in printed
        check_whole(config, tmp_path)

    @pytest.mark.long
    def test_sigterm_reaches_the_processes(self, tmp_path: Path) -> None:
        config = fast_config(tmp_path)
        stopped = CheckpointConfig(stopped_status=75)
        run = dataclasses.replace(config, steps=100_000, checkpoint=stopped)
        arguments = ["--checkpoint.stopped-status", "75", *without_distributed(run)]
        with launch(["-n", "2", "tiny", *arguments]) as launcher:
            wait_until(lambda: len(losses(config.run_dir)) > 3, lambda: "no steps")
            launcher.terminate()
            printed = finished(launcher)
        assert launcher.returncode == 75, printed
        assert "stopped after step" in printed and "restarts left" not in printed
        last = losses(config.run_dir)[-1][0]
        assert (config.run_dir / "checkpoints" / str(last)).is_dir()


def launch(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.launch.one_host", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finished(process: subprocess.Popen[bytes]) -> str:
    """The output of a program when it ends; one that does not end is stopped."""
    try:
        return process.communicate(timeout=600)[0].decode()
    except subprocess.TimeoutExpired:
        # SIGTERM, so that it stops its children.
        process.terminate()
        return process.communicate(timeout=60)[0].decode()


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(number) for number in path.read_text().split()]


class TestSlurmScript:
    """slurm.sh with fake programs that print their arguments."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "bin"
        log = tmp_path / "log"
        fake_program(path, "srun", f'echo "srun $*" >>{log}\nexit $SRUN_STATUS')
        for name in ("scontrol", "scancel"):
            fake_program(path, name, f'echo "{name} $*" >>{log}')
        return path

    def run(self, path: Path, status: int, restarts: int = 0):
        run = run_script(
            "slurm.sh",
            *("tiny", "--steps", "7"),
            path=path,
            SLURM_SUBMIT_DIR=str(ROOT),
            SLURM_JOB_ID="9",
            SLURM_RESTART_COUNT=str(restarts),
            SRUN_STATUS=str(status),
            PYTHON="python3.x",
        )
        assert run.returncode == status
        return (path.parent / "log").read_text().splitlines()

    def test_the_run_has_a_valid_configuration(self, path: Path) -> None:
        (printed,) = self.run(path, 0)
        before, _, arguments = printed.partition(" -m train ")
        assert before == "srun --kill-on-bad-exit=1 python3.x"
        config = parse(arguments.split())
        assert config.steps == 7 and config.distributed.coordinator == "auto"
        assert config.checkpoint.stopped_status == 75

    @pytest.mark.parametrize("status", [75, 137])
    def test_an_unfinished_run_is_queued_again(self, path: Path, status: int) -> None:
        assert self.run(path, status)[1:] == ["scontrol requeue 9"]

    @pytest.mark.parametrize("case", [(0, 0), (1, 0), (2, 0), (75, 20)], ids=str)
    def test_a_finished_run_is_not_queued_again(
        self, path: Path, case: tuple[int, int]
    ) -> None:
        assert len(self.run(path, *case)) == 1


def skip_if(missing: str | None) -> None:
    """Skips a test, with a reason, on a machine that cannot run it."""
    if missing is not None:
        pytest.skip(missing)


@pytest.mark.long
class TestSlurm:
    """slurm.sh under SLURM itself."""

    def test_a_preempted_job_resumes(self, tmp_path: Path) -> None:
        skip_if(slurm.missing())
        config = fast_config(tmp_path)
        config = dataclasses.replace(
            config, checkpoint=CheckpointConfig(every=100_000), steps=1000
        )
        output = tmp_path / "job.out"
        folder = tmp_path / "slurm"
        folder.mkdir()
        with slurm.cluster(folder) as environment:
            environment |= {"PYTHON": sys.executable}
            submit = "sbatch --parsable --ntasks-per-node=2 --gpus-per-node=0".split()
            job = slurm.ask(
                environment,
                *submit,
                f"--output={output}",
                f"--chdir={ROOT}",
                str(LAUNCH / "slurm.sh"),
                "tiny",
                *without_distributed(config),
            ).strip()
            assert job.isdigit(), job
            started = lambda: len(losses(config.run_dir)) > 3  # noqa: E731
            wait_until(started, lambda: output.read_text() if output.exists() else "")
            # As SLURM does before the job's time limit.
            slurm.ask(environment, "scancel", "--signal=TERM", "--batch", job)
            try:
                slurm.wait_for(
                    environment, "JobState=COMPLETED", "scontrol", "show", "job", job
                )
            finally:
                printed = output.read_text()
        assert "status 75: the run will resume from its last checkpoint" in printed, (
            printed
        )
        assert "resuming from step" in printed and "the run is complete" in printed
        check_whole(config, tmp_path)


@pytest.mark.long
def test_two_hosts_find_each_other_from_slurms_variables(tmp_path: Path) -> None:
    skip_if(hosts.missing())
    config = fast_config(tmp_path)
    run = [*without_distributed(config), "--distributed.coordinator", "auto"]
    with hosts.two_hosts(tmp_path) as places:
        programs = [
            start(["tiny", *run], tmp_path / "cache", tmp_path / f"{n}.log", place, env)
            for n, (place, env) in enumerate(zip(places, map(task, "01"), strict=True))
        ]
        for number, program in enumerate(programs):
            finish(program, tmp_path / f"{number}.log")
    check_whole(config, tmp_path)


def task(number: str) -> dict[str, str]:
    """The environment of one of two tasks, each on its own node."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "host[0-1]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": number,
        "SLURM_LOCALID": "0",
    }


class TestTpuScript:
    """tpu.sh with a fake gcloud that prints its arguments."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        body = f'printf "%s\\n" "$@" >{tmp_path / "log"}'
        fake_program(tmp_path / "bin", "gcloud", body)
        return tmp_path / "bin"

    def run(self, path: Path, *arguments: str) -> list[str]:
        done = run_script("tpu.sh", *arguments, path=path, REPOSITORY="https://u/r x")
        assert done.returncode == 0, done.stderr
        return (path.parent / "log").read_text().splitlines()

    def test_one_slice_is_requested(self, path: Path) -> None:
        printed = self.run(path, *"create n zone v5p-128 v2-alpha-tpuv5 --spot".split())
        assert printed == [
            *"compute tpus queued-resources create n --zone=zone --node-id=n".split(),
            "--accelerator-type=v5p-128",
            "--runtime-version=v2-alpha-tpuv5",
            "--spot",
        ]

    def test_many_slices_are_requested(self, path: Path) -> None:
        printed = self.run(path, *"create n zone v5p-128 v2-alpha-tpuv5 4".split())
        assert printed[6:8] == ["--node-count=4", "--node-prefix=n"]

    def test_the_run_has_a_valid_configuration(
        self, path: Path, tmp_path: Path
    ) -> None:
        printed = self.run(
            path, "run", "n", "zone", "tiny", "--sample.prompt", "it's $x"
        )
        assert printed[:7] == (
            "compute tpus queued-resources ssh n --zone=zone --node=all".split()
        )
        assert printed[7] == "--worker=all"
        command = "\n".join(printed[8:]).removeprefix("--command=")
        # As the remote shell parses it.
        over_there = tmp_path / "there"
        (over_there / "usp_jax" / ".venv" / "bin").mkdir(parents=True)
        log = tmp_path / "arguments"
        body = f'printf "%s\\0" "$@" >{log}'
        fake_program(over_there / "usp_jax" / ".venv" / "bin", "python", body)
        subprocess.run(["bash", "-c", command], cwd=over_there, check=True)
        python, module, *arguments = log.read_text().split("\0")[:-1]
        assert (python, module) == ("-m", "train")
        config = parse(arguments)
        assert config.sample.prompt == "it's $x"
        assert config.distributed.coordinator == "auto"
        assert config.checkpoint.stopped_status == 75
        assert "git clone --quiet https://u/r\\ x usp_jax" in command

    def test_slices_are_released(self, path: Path) -> None:
        printed = self.run(path, "delete", "n", "zone")
        assert printed[3:] == ["delete", "n", "--zone=zone", "--force", "--quiet"]

    @pytest.mark.parametrize("arguments", [[], ["create", "n"], ["ride"], ["run"]])
    def test_usage(self, path: Path, arguments: list[str]) -> None:
        done = run_script("tpu.sh", *arguments, path=path)
        assert done.returncode == 2
        assert done.stderr.startswith("A run on Cloud TPU slices")


# Schema of the fields that these files use, from JobSet's v1alpha2, Job's batch/v1 and
# Pod's v1; a list holds the schema of its entries.
CONTAINER = {
    "name": str,
    "image": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {"nvidia.com/gpu": int, "google.com/tpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "hostNetwork": bool,
    "dnsPolicy": str,
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": str,
        "cloud.google.com/gke-tpu-topology": str,
    },
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": str},
        }
    ],
}
ON_EXIT = {"containerName": str, "operator": str, "values": [int]}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [{"action": str, "onExitCodes": ON_EXIT}]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {
        "name": str,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str},
    },
    "spec": {
        "network": {"enableDNSHostnames": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def faults(found: object, wanted: object, path: str = "") -> list[str]:
    """Paths in a document that its schema does not have."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return [path]
        return [
            fault
            for name, value in found.items()
            for fault in (
                faults(value, wanted[name], f"{path}.{name}")
                if name in wanted
                else [f"{path}.{name}"]
            )
        ]
    if isinstance(wanted, list):
        if not isinstance(found, list):
            return [path]
        return [fault for x in found for fault in faults(x, wanted[0], path)]
    return [] if type(found) is wanted else [path]


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_match_the_kubernetes_schema(path: Path) -> None:
    printed = yaml.safe_load(path.read_text())
    assert faults(printed, JOBSET) == []
    assert (printed["apiVersion"], printed["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    (group,) = printed["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    # A policy of exit codes needs "Never"; 0 means that no pod is retried alone.
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = pod["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_the_runs_of_jobsets_are_valid(path: Path) -> None:
    printed = yaml.safe_load(path.read_text())
    (group,) = printed["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python3", "-m", "train"]
    index = [text.replace("$(JOB_COMPLETION_INDEX)", "1") for text in container["args"]]
    config = parse(index)
    assert config.checkpoint.stopped_status == 75 and config.fake_devices is None
    pods = group["replicas"] * job["completions"]
    (devices,) = container["resources"]["limits"].values()
    assert config.mesh.devices == pods * devices
    if config.distributed.coordinator != "auto":
        # A pod has the names of JobSet, group, job and its own; the JobSet's is its
        # subdomain.
        name = printed["metadata"]["name"]
        (port,) = (port["containerPort"] for port in container["ports"])
        address = f"{name}-{group['name']}-0-0.{name}:{port}"
        assert config.distributed.coordinator == address
        assert config.distributed.num_processes == pods


def test_a_wrong_field_is_found() -> None:
    wrong = {"spec": {"failurePolicy": {"maxRestart": 3}, "replicatedJobs": {}}}
    assert faults(wrong, JOBSET) == [
        ".spec.failurePolicy.maxRestart",
        ".spec.replicatedJobs",
    ]
