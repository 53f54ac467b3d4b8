"""`sa3dist submit`: start a run on this machine, with Slurm or on Kubernetes."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sa3dist import config
from sa3dist.config import Settings
from sa3dist.data.remote.fetch import is_remote
from sa3dist.data.remote.local_paths import local_name
from sa3dist.errors import ConfigError, EnvironmentFailure
from sa3dist.model.released import RELEASED
from sa3dist.runtime.exit_status import command, positive
from sa3dist.runtime.launch_files import label, launch_file


def submit(options: argparse.Namespace) -> None:
    """Submit the run to its backend."""
    # Check the settings here, rather than after hours in a queue.
    settings = config.build(config.read_arguments(options.arguments))
    # Local and Slurm runs use this installation; Slurm passes the environment on.
    os.environ.setdefault("SA3DIST_PYTHON", sys.executable)
    BACKENDS[options.backend](settings, options)


def local(settings: Settings, options: argparse.Namespace) -> None:
    """Replace this process by launch/local.sh, so that signals and exit code are passed directly."""
    if options.nodes > 1:
        raise ConfigError(f"submit: --nodes {options.nodes} needs --backend slurm or kubernetes")
    processes = ["-n", str(options.processes)] if options.processes else []
    command = ["bash", str(launch_file("local.sh")), *processes, *options.arguments]
    if options.dry_run:
        print(_with_environment(command))
    else:
        os.execvp(command[0], command)


def slurm(settings: Settings, options: argparse.Namespace) -> None:
    """Queue a batch script that is requeued when interrupted."""
    processes, nodes = options.processes, options.nodes
    script = launch_file("slurm/multi_node.sbatch" if nodes > 1 else "slurm/preemptible.sbatch")
    resources = [f"--job-name={label(settings.name)}", f"--nodes={nodes}"]
    resources += [f"--gpus-per-node={processes}"] if processes else []
    command = ["sbatch", "--parsable", *resources, *options.option, str(script), *options.arguments]
    if options.dry_run:
        print(f"# {_with_environment(command)}\n{script.read_text(encoding='utf-8')}", end="")
    else:
        print(_run_client(command))


def _with_environment(command: list[str]) -> str:
    return shlex.join([f"SA3DIST_PYTHON={os.environ['SA3DIST_PYTHON']}", *command])


def kubernetes(settings: Settings, options: argparse.Namespace) -> None:
    """Apply the settings as a ConfigMap, and a Job, or a JobSet for several nodes."""
    _require_paths_in_the_pod(settings, config.read_arguments(options.arguments))
    documents = [
        _config_map(settings, options),
        _job(settings, options) if options.nodes == 1 else _job_set(settings, options),
    ]
    text = yaml.safe_dump_all(documents, sort_keys=False, width=120)
    if options.dry_run:
        print(text, end="")
    else:
        print(_run_client(["kubectl", "apply", *options.option, "--filename=-"], text))


def _require_paths_in_the_pod(settings: Settings, arguments: dict[str, Any]) -> None:
    """Raises ConfigError for a path that means something else in a pod, whose home and working directory differ."""
    for key in ("output_dir", "work_dir", "audio_data_url", "model", "lora_checkpoint_url"):
        value = str(getattr(settings, key) or "")
        if not value or is_remote(value) or value in RELEASED:
            continue
        if str(arguments.get(key) or "").startswith("~"):
            raise ConfigError(
                f"{key}: {arguments[key]} is a home of this machine; give its path in the pod, below /data"
            )
        if not Path(local_name(value)).is_absolute():
            raise ConfigError(f"{key}: {value} is relative; give its path in the pod, below /data")


BACKENDS: dict[str, Callable[[Settings, argparse.Namespace], None]] = {
    "local": local,
    "slurm": slurm,
    "kubernetes": kubernetes,
}
ARGUMENTS = {
    "arguments": {"nargs": "+", "metavar": "CONFIG.yaml|REQUEST.json|key=value", "help": "as for sa3dist train"},
    "--backend": {"required": True, "choices": BACKENDS},
    "--dry-run": {"action": "store_true", "help": "print what would be submitted, and submit nothing"},
    "--processes": {"type": positive, "metavar": "N", "help": "per node; unset = all GPUs, 8 with a scheduler"},
    "--nodes": {"type": positive, "default": 1, "metavar": "N", "help": "nodes (slurm, kubernetes)"},
    "--option": {
        "action": "append",
        "default": [],
        "help": "passed on to sbatch or kubectl apply, as --option=--partition=gpu; may repeat",
    },
    "--image": {"default": "sa3dist:0.1.0", "help": "container image (kubernetes)"},
    "--volume": {"default": "sa3dist-data", "help": "volume claim mounted at /data (kubernetes)"},
}
# Exit code 0 when submitted, 2 if the settings are refused, 70 if the backend fails. The local backend's exit code is
# the run's. The run itself writes the status in its output_dir.
main = command("sa3dist submit", ARGUMENTS, submit, description="Start a training run on a backend.")


def _run_client(command: list[str], text: str | None = None) -> str:
    """Run a scheduler's client; returns its output. Raises EnvironmentFailure with its error message."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise EnvironmentFailure(
            f"submit: {command[0]} is not installed here; --dry-run shows what it would get"
        ) from error
    if done.returncode != 0:
        message = " ".join((done.stderr or done.stdout).split())
        raise EnvironmentFailure(f"submit: {command[0]} refused ({done.returncode}): {message}")
    return done.stdout.strip()


def _config_map(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    values = config.read_arguments(options.arguments) | {
        key: str(getattr(settings, key)) for key in ("output_dir", "work_dir")
    }
    name = f"{label(settings.name)}-config"
    text = yaml.safe_dump(values, sort_keys=False)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"config.yaml": text}}


def _template(file: str, settings: Settings) -> dict[str, Any]:
    template = yaml.safe_load(launch_file(f"kubernetes/{file}").read_text(encoding="utf-8"))
    template["metadata"]["name"] = label(settings.name)
    return template


def _job(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    job = _template("job.yaml", settings)
    container = _fill_pod(job["spec"]["template"]["spec"], settings, options)
    if options.processes:
        at = next(i for i, word in enumerate(container["command"]) if word.startswith("--nproc-per-node="))
        container["command"][at] = f"--nproc-per-node={options.processes}"
    return job


def _job_set(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    job_set = _template("jobset.yaml", settings)
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["completions"] = job["parallelism"] = options.nodes
    name = job_set["metadata"]["name"]
    changes = {"PET_NNODES": str(options.nodes), "PET_MASTER_ADDR": f"{name}-node-0-0.{name}"}
    if options.processes:
        changes["PET_NPROC_PER_NODE"] = str(options.processes)
    for variable in _fill_pod(job["template"]["spec"], settings, options)["env"]:
        if variable["name"] in changes:
            variable["value"] = changes[variable["name"]]
    return job_set


def _fill_pod(pod: dict[str, Any], settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """Set image, GPUs, volume, settings and output_dir of this run in a pod; returns its container."""
    container = pod["containers"][0]
    container["image"] = options.image
    if options.processes:
        container["resources"]["limits"]["nvidia.com/gpu"] = options.processes
    container["livenessProbe"]["exec"]["command"][2:] = [str(settings.output_dir)]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    volumes["data"]["persistentVolumeClaim"]["claimName"] = options.volume
    volumes["config"]["configMap"]["name"] = f"{label(settings.name)}-config"
    return container
