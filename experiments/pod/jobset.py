"""The JobSet that GKE runs: a pod of Kubernetes on every host of a slice, the bucket mounted in it.

JSON, which kubectl reads as it reads YAML. The names of hosts and the index of each come from GKE
(TPU_WORKER_HOSTNAMES, TPU_WORKER_ID). A pod whose entry ended with 2, an error that would only
happen again, ends the job; any other end, such as a node taken away, begins it anew on all hosts.
"""

from experiments.pod.environment import PORT
from experiments.pod.slices import Slice
from kimijax.errors import UserError

GRACE = 600  # seconds from SIGTERM to SIGKILL; of spot nodes Kubernetes leaves 25
MOUNT_OPTIONS = "implicit-dirs"  # objects need no directory


def jobset(
    name: str, where: Slice, image: str, command: list[str], bucket: str, mount: str,
    restarts: int, spot: bool, account: str,
) -> dict:
    """The manifest.

    bucket   its name, without gs://
    account  of Kubernetes, which may write to the bucket
    """
    job = _job(where, _pod(where, image, command, bucket, mount, spot, account))
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            # All of its pods on one slice.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": restarts,
                "rules": [{
                    "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"],
                }],
            },
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(
    where: Slice, image: str, command: list[str], bucket: str, mount: str, spot: bool, account: str
) -> dict:
    """What runs on a host."""
    container = {
        "name": "kimijax",
        "image": image,
        "command": command,
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {"google.com/tpu": where.per_host}},
        "volumeMounts": [{"name": "bucket", "mountPath": mount}],
    }
    volume = {
        "name": "bucket",
        "csi": {
            "driver": "gcsfuse.csi.storage.gke.io",
            "volumeAttributes": {"bucketName": bucket, "mountOptions": MOUNT_OPTIONS},
        },
    }
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": where.names.gke,
        "cloud.google.com/gke-tpu-topology": where.sizes,
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "serviceAccountName": account,
        "nodeSelector": nodes | ({"cloud.google.com/gke-spot": "true"} if spot else {}),
        "containers": [container],
        "volumes": [volume],
    }


def _job(where: Slice, pod: dict) -> dict:
    """A pod on every host of a slice."""
    return {
        "parallelism": where.hosts,
        "completions": where.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{
            "action": "FailJob",
            "onExitCodes": {
                "containerName": "kimijax", "operator": "In", "values": [UserError.code],
            },
        }]},
        "template": {
            "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
            "spec": pod,
        },
    }
