"""Runs the trainer as a JobSet on Kubernetes, under a name made from the request's id.

Kubernetes schedules the JobSet and restarts lost pods; it outlives its runner. Names are unique, so after a crash the
next runner finds the JobSet.
"""

import contextlib
import signal
import time
from typing import Any

import yaml

from sa3dist.errors import ConfigError, EnvironmentFailure
from sa3dist.runtime.launch_files import launch_file
from sa3dist.serve.cluster import ANSWER_SECONDS, ClusterRun
from sa3dist.serve.executor import Attempt
from sa3dist.serve.options import RunOptions

LOOK_SECONDS = 0.5
TERMINAL = ("Completed", "Failed")
OPTIONS = ("namespace", "image", "claim", "mount", "cpu", "memory")
KIND = {"group": "jobset.x-k8s.io", "version": "v1alpha2", "plural": "jobsets"}


class Kubernetes:
    """Creates launch/kubernetes/jobset.yaml, with a pod per node. In pods the jobs' folder is on the claim's mount.

    RunOptions.options: namespace=; and to replace values of the manifest image=, claim=, mount= (of the claim), cpu=
    and memory= (of a pod)
    """

    outlives_runner = True

    def __init__(self, options: RunOptions) -> None:
        try:
            import urllib3
            from kubernetes import client, config
        except ModuleNotFoundError as error:
            raise ConfigError("executor: kubernetes is not installed; pip install 'sa3dist[kubernetes]'") from error
        values = dict(option.partition("=")[::2] for option in options.options)
        if unknown := sorted(values.keys() - set(OPTIONS)):
            known = ", ".join(f"{name}=" for name in OPTIONS)
            raise ConfigError(f"option: {unknown[0]} is unknown; kubernetes takes {known}")
        self._namespace, self._values = values.pop("namespace", "default"), values
        self._failures = (client.ApiException, urllib3.exceptions.HTTPError)
        try:
            # In a pod it uses the service account, elsewhere the user's kubeconfig.
            config.load_config()
        except config.ConfigException as error:
            raise EnvironmentFailure(f"kubernetes: {error}") from error
        self._api = client.CustomObjectsApi()
        self._asked_to_stop = False
        self._name = ""

    def start(self, attempt: Attempt) -> None:
        self._name = f"sa3dist-{attempt.job.id}"
        self._run = ClusterRun(attempt)
        existing = self._find()
        if (existing is not None and not _is_over(existing)) or self._run.has_ended() or attempt.job.cancel:
            return
        if existing is not None:
            # The previous attempt's, which has ended: remove it to free the name.
            self._remove()
        self._run.note()
        body = job_set(self._name, attempt, self._values)
        self._ask(self._api.create_namespaced_custom_object, body=body, namespace=self._namespace)

    def exit_code(self) -> int | None:
        def is_there() -> bool:
            existing = self._find()
            return existing is not None and not _is_over(existing)

        return self._run.exit_code(is_there, self._asked_to_stop, lambda: -signal.SIGKILL)

    def ask_to_stop(self) -> None:
        self._asked_to_stop = True
        # Its pods get SIGTERM, then SIGKILL after their grace period. The JobSet exists until the pods have ended.
        self._delete()

    def kill(self) -> bool:
        self._delete()
        return self._find() is None

    def _find(self) -> dict[str, Any] | None:
        return self._ask(self._api.get_namespaced_custom_object, name=self._name, namespace=self._namespace)

    def _remove(self) -> None:
        self._delete()
        deadline = time.monotonic() + ANSWER_SECONDS
        while self._find() is not None:
            if time.monotonic() > deadline:
                raise EnvironmentFailure(f"kubernetes: {self._name} of the previous attempt cannot be removed")
            time.sleep(LOOK_SECONDS)

    def _delete(self) -> None:
        options = {"name": self._name, "namespace": self._namespace, "propagation_policy": "Foreground"}
        self._ask(self._api.delete_namespaced_custom_object, **options)

    def _ask(self, call: Any, **options: Any) -> Any:
        """Call the API. None if the object does not exist, or already exists. Raises EnvironmentFailure."""
        try:
            return call(**KIND, **options, _request_timeout=ANSWER_SECONDS)
        except self._failures as error:
            if getattr(error, "status", None) in (404, 409):
                return None
            why = getattr(error, "reason", None) or error
            raise EnvironmentFailure(f"kubernetes: {' '.join(str(why).split())[:300]}") from error


def _is_over(job_set: dict[str, Any]) -> bool:
    status = job_set.get("status") or {}
    conditions = {c["type"] for c in status.get("conditions") or () if c.get("status") == "True"}
    return status.get("terminalState") in TERMINAL or bool(conditions & set(TERMINAL))


def job_set(name: str, attempt: Attempt, values: dict[str, str]) -> dict[str, Any]:
    """The shipped manifest for one run: a pod per node, with ``processes`` GPUs each. values: see ``Kubernetes``."""
    manifest = yaml.safe_load(launch_file("kubernetes/jobset.yaml").read_text(encoding="utf-8"))
    manifest["metadata"]["name"] = name
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["completions"] = job["parallelism"] = attempt.nodes
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    container["image"] = values.get("image", container["image"])
    request = str(attempt.request)
    container["command"] = [request if word.endswith("config.yaml") else word for word in container["command"]]
    resources = container["resources"]
    resources["limits"]["nvidia.com/gpu"] = attempt.processes
    resources["requests"] |= {name: values[name] for name in ("cpu", "memory") if name in values}
    resources["limits"]["memory"] = resources["requests"]["memory"]
    container["livenessProbe"]["exec"]["command"][2:] = [str(attempt.run)]
    master = f"{name}-node-0-0.{name}"
    changes = {"PET_NNODES": attempt.nodes, "PET_NPROC_PER_NODE": attempt.processes, "PET_MASTER_ADDR": master}
    for variable in container["env"]:
        if variable["name"] in changes:
            variable["value"] = str(changes[variable["name"]])
    # No config volume: the settings are in the jobs' folder.
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "config"]
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "config"]
    for mount in container["volumeMounts"]:
        if mount["name"] == "data":
            mount["mountPath"] = values.get("mount", mount["mountPath"])
    with contextlib.suppress(KeyError):
        next(v for v in pod["volumes"] if v["name"] == "data")["persistentVolumeClaim"]["claimName"] = values["claim"]
    return manifest
