"""The GKE manifest, checked by what JobSet v1alpha2 and the exit codes demand: no cluster is at hand here."""

from typing import Any

import yaml  # type: ignore[import-untyped]

from nfnet_flax import exit_codes
from tests.runs import ROOT

# The fields that the manifest may use: required ones without, optional ones with a question mark. A list holds the
# shape of its items.
SHAPE = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations?": dict},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": str,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "completionMode": str,
                        "parallelism": int,
                        "completions": int,
                        "backoffLimit": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": str,
                                    "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
                                }
                            ]
                        },
                        "template": {
                            "spec": {
                                "restartPolicy": str,
                                "serviceAccountName": str,
                                "terminationGracePeriodSeconds": int,
                                "nodeSelector": dict,
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "command": [str],
                                        "args": [str],
                                        "env": [{"name": str, "value": str}],
                                        "ports": [{"containerPort": int}],
                                        "resources": {"requests": dict, "limits": dict},
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                    }
                                ],
                                "volumes": [{"name": str, "emptyDir": dict}],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def misfits(value: Any, shape: Any, path: str) -> list[str]:
    """Where a parsed manifest differs from a shape."""
    if isinstance(shape, type):
        return [] if isinstance(value, shape) and not (shape is int and value is True) else [f"{path}: {value!r}"]
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{path}: not a list with items"]
        return [line for index, item in enumerate(value) for line in misfits(item, shape[0], f"{path}[{index}]")]
    names = {name.removesuffix("?"): name for name in shape}
    lines = [f"{path}.{name}: unknown" for name in value if name not in names]
    lines += [f"{path}.{name}: missing" for name in shape if not name.endswith("?") and name not in value]
    return lines + [
        line for name in value if name in names for line in misfits(value[name], shape[names[name]], f"{path}.{name}")
    ]


def test_the_jobset_is_one_and_agrees_with_the_exit_codes() -> None:
    account, jobset = yaml.safe_load_all((ROOT / "tools" / "launch" / "gke_jobset.yaml").read_text())
    assert misfits(jobset, SHAPE, "") == []
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]

    actions = {rule["action"]: rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"]}
    assert actions["Ignore"]["values"] == [exit_codes.EXIT_STOPPED]
    assert actions["FailJob"]["values"] == [exit_codes.EXIT_BAD_INPUT, exit_codes.EXIT_DIVERGED]
    assert all(on["operator"] == "In" and on["containerName"] == container["name"] for on in actions.values())
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # a pod failure policy is refused otherwise
    assert job["completionMode"] == "Indexed"

    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    width, height = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == width * height // chips
    assert container["command"][:2] == ["nfnet", "train"]

    assert (account["kind"], account["metadata"]["name"]) == ("ServiceAccount", pod["serviceAccountName"])
    (volume,) = pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert (mount["name"], mount["mountPath"]) == (volume["name"], "/tmp")  # where checkpoints are written first
    options = dict(option.split("=") for option in container["args"])
    for name in ("--workdir", "--data.source.train", "--data.source.eval"):
        assert options[name].startswith("gs://BUCKET/")
    assert int(options["--execution.num-microbatches"]) == width * height
