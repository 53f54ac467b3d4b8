"""Objects of Kubernetes against the models of its API: what those would drop of a manifest."""

import json
from typing import Any

# Of each group and version: which package has its models, and how they are called there.
KUBEFLOW = {"jobset.x-k8s.io/v1alpha2": "JobsetV1alpha2", "trainer.kubeflow.org/v1alpha1": "TrainerV1alpha1"}
KUBERNETES = ("v1", "apps/v1", "batch/v1", "rbac.authorization.k8s.io/v1")


def _core(value: dict, model: str) -> dict:
    from kubernetes.client import ApiClient

    # The API takes a number for a quantity, its models a text alone.
    value = json.loads(json.dumps(value), object_hook=_quantities_as_text)
    client = ApiClient()
    # The public one takes an answer of the API, in another form in each version.
    made = client._ApiClient__deserialize(value, model)
    return client.sanitize_for_serialization(made)


def _quantities_as_text(value: dict) -> dict:
    for name in ("limits", "requests"):
        if isinstance(value.get(name), dict):
            value[name] = {key: str(amount) for key, amount in value[name].items()}
    return value


def lost(document: dict[str, Any]) -> list[str]:
    """Paths of what the models of its kind do not keep. Raises ValueError for what they do not take."""
    version, kind = document["apiVersion"], document["kind"]
    if version in KUBERNETES:
        return _difference(document, _core(document, f"V1{kind}"))
    from kubeflow_trainer_api import models

    found = _difference(document, getattr(models, KUBEFLOW[version] + kind).from_dict(document).to_dict())
    # The jobs in it are Kubernetes' own.
    for job in document["spec"].get("replicatedJobs", []):
        found += _difference(job["template"], _core(job["template"], "V1JobTemplateSpec"), ".template")
    return found


def _difference(given: Any, kept: Any, where: str = "") -> list[str]:
    if isinstance(given, dict):
        known = kept if isinstance(kept, dict) else {}
        return [path for key, value in given.items() for path in _difference(value, known.get(key), f"{where}.{key}")]
    if isinstance(given, list):
        pairs = zip(given, kept or [None] * len(given), strict=True)
        return [path for number, pair in enumerate(pairs) for path in _difference(*pair, f"{where}[{number}]")]
    # A quantity may be a number or a text.
    return [] if given == kept or str(given) == kept else [where]
