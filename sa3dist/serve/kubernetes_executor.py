"""The trainer as a JobSet on Kubernetes: made once under a name of the request's id, watched, deleted.

Kubernetes places it, starts lost pods again and outlives its shepherd. A name can be made once: a second submit, after
a crash, finds the first.
"""

import contextlib
import signal
import time
from typing import Any

import yaml

from sa3dist.errors import ConfigError, EnvironmentFailure
from sa3dist.runtime.launch_files import launch_file
from sa3dist.serve.cluster import ANSWER_SECONDS, Submitted
from sa3dist.serve.executor import Attempt
from sa3dist.serve.options import RunOptions

LOOK_SECONDS = 0.5
TERMINAL = ("Completed", "Failed")
WORDS = ("namespace", "image", "claim", "mount", "cpu", "memory")
KIND = {"group": "jobset.x-k8s.io", "version": "v1alpha2", "plural": "jobsets"}


class Kubernetes:
    """Makes launch/kubernetes/jobset.yaml with a pod per node. The jobs' folder is below the claim's mount there, too.

    RunOptions.options: namespace=, and in the place of what the manifest has image=, claim=, mount= (of the claim),
    cpu= and memory= (of a pod)
    """

    outlives_shepherd = True

    def __init__(self, options: RunOptions) -> None:
        try:
            import urllib3
            from kubernetes import client, config
        except ModuleNotFoundError as error:
            raise ConfigError("executor: kubernetes is not installed; pip install 'sa3dist[kubernetes]'") from error
        words = dict(option.partition("=")[::2] for option in options.options)
        if unknown := sorted(words.keys() - set(WORDS)):
            raise ConfigError(f"option: {unknown[0]} is unknown; kubernetes takes {', '.join(f'{w}=' for w in WORDS)}")
        self._namespace, self._words = words.pop("namespace", "default"), words
        self._failures = (client.ApiException, urllib3.exceptions.HTTPError)
        try:
            # In a pod by its service account, elsewhere by the user's own file.
            config.load_config()
        except config.ConfigException as error:
            raise EnvironmentFailure(f"kubernetes: {error}") from error
        self._api = client.CustomObjectsApi()
        self._asked_to_stop = False
        self._name = ""

    def start(self, attempt: Attempt) -> None:
        self._name = f"sa3dist-{attempt.job.id}"
        self._run = Submitted(attempt)
        found = self._find()
        if (found is not None and not _is_over(found)) or self._run.has_ended() or attempt.job.cancel:
            return
        if found is not None:
            # Of the attempt before, which has ended; its name is free once it is gone.
            self._remove()
        self._run.note()
        body = job_set(self._name, attempt, self._words)
        self._ask(self._api.create_namespaced_custom_object, body=body, namespace=self._namespace)

    def exit_code(self) -> int | None:
        def is_there() -> bool:
            found = self._find()
            return found is not None and not _is_over(found)

        return self._run.exit_code(is_there, self._asked_to_stop, lambda: -signal.SIGKILL)

    def ask_to_stop(self) -> None:
        self._asked_to_stop = True
        # Its pods are sent SIGTERM, and SIGKILL after their grace; in the foreground: it is there as long as they are.
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
                raise EnvironmentFailure(f"kubernetes: {self._name} of the attempt before does not go away")
            time.sleep(LOOK_SECONDS)

    def _delete(self) -> None:
        words = {"name": self._name, "namespace": self._namespace, "propagation_policy": "Foreground"}
        self._ask(self._api.delete_namespaced_custom_object, **words)

    def _ask(self, call: Any, **words: Any) -> Any:
        """The answer; None where there is no such object, or one of that name already. Raises EnvironmentFailure."""
        try:
            return call(**KIND, **words, _request_timeout=ANSWER_SECONDS)
        except self._failures as error:
            if getattr(error, "status", None) in (404, 409):
                return None
            why = getattr(error, "reason", None) or error
            raise EnvironmentFailure(f"kubernetes: {' '.join(str(why).split())[:300]}") from error


def _is_over(found: dict[str, Any]) -> bool:
    status = found.get("status") or {}
    ended = {c["type"] for c in status.get("conditions") or () if c.get("status") == "True"}
    return status.get("terminalState") in TERMINAL or bool(ended & set(TERMINAL))


def job_set(name: str, attempt: Attempt, words: dict[str, str]) -> dict[str, Any]:
    """The shipped manifest for one run: a pod per node, with ``processes`` GPUs each. words: as in ``Kubernetes``."""
    made = yaml.safe_load(launch_file("kubernetes/jobset.yaml").read_text(encoding="utf-8"))
    made["metadata"]["name"] = name
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["completions"] = job["parallelism"] = attempt.nodes
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    container["image"] = words.get("image", container["image"])
    request = str(attempt.request)
    container["command"] = [request if word.endswith("config.yaml") else word for word in container["command"]]
    resources = container["resources"]
    resources["limits"]["nvidia.com/gpu"] = attempt.processes
    resources["requests"] |= {word: words[word] for word in ("cpu", "memory") if word in words}
    resources["limits"]["memory"] = resources["requests"]["memory"]
    container["livenessProbe"]["exec"]["command"][2:] = [str(attempt.run)]
    master = f"{name}-node-0-0.{name}"
    changes = {"PET_NNODES": attempt.nodes, "PET_NPROC_PER_NODE": attempt.processes, "PET_MASTER_ADDR": master}
    for variable in container["env"]:
        if variable["name"] in changes:
            variable["value"] = str(changes[variable["name"]])
    # Its settings lie beside its results.
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "config"]
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "config"]
    for mount in container["volumeMounts"]:
        if mount["name"] == "data":
            mount["mountPath"] = words.get("mount", mount["mountPath"])
    with contextlib.suppress(KeyError):
        next(v for v in pod["volumes"] if v["name"] == "data")["persistentVolumeClaim"]["claimName"] = words["claim"]
    return made
