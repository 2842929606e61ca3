"""One table of cause <-> meaning <-> what can be done about a job that waits."""

from __future__ import annotations

from collections import defaultdict

from diffusion_api.waiting import Wait, WaitingCause

_C = WaitingCause

WAITS: tuple[Wait, ...] = (
    Wait(
        _C.QUOTA_EXCEEDED,
        "",
        "a ResourceQuota of the namespace does not allow the pod",
        "delete pods that are not needed, or ask for a larger quota: kubectl describe resourcequota {quota} "
        "--namespace {namespace}",
    ),
    Wait(
        _C.POD_SECURITY_REJECTED,
        "",
        "the namespace's Pod Security level does not allow the pod",
        "ask who runs the cluster to look at the level: kubectl get namespace {namespace} --show-labels",
    ),
    Wait(
        _C.MISSING_SERVICE_ACCOUNT,
        "",
        "the service account does not exist",
        "create it (kubectl create serviceaccount {name} --namespace {namespace}), or correct "
        "spec.credentials.serviceAccountName; the job goes on by itself",
    ),
    Wait(
        _C.MISSING_PRIORITY_CLASS,
        "",
        "the priority class does not exist",
        "correct spec.podOverrides.priorityClassName; list the classes with kubectl get priorityclasses",
    ),
    Wait(
        _C.MISSING_RUNTIME_CLASS,
        "",
        "the runtime class does not exist",
        "ask who runs the cluster to create RuntimeClass {name}, or to correct the profile's runtimeClassName: "
        "kubectl get runtimeclasses",
    ),
    Wait(
        _C.SERVICE_NAME_TAKEN,
        "",
        "pods on several nodes need a Service of the job's name, and there is one that is not of this job",
        "create the job under another name, or delete the Service if nobody needs it: kubectl delete service {service} "
        "--namespace {namespace}",
    ),
    Wait(
        _C.POD_NAME_TAKEN,
        "",
        "a pod of that name exists and is not of this job",
        "wait if it is of an earlier job of the same name, which goes by itself; otherwise delete it: kubectl delete "
        "pod {pod} --namespace {namespace}",
    ),
    Wait(
        _C.ADMISSION_REJECTED,
        "",
        "the API server or one of its webhooks refused the pod",
        "correct what the message names in spec.podOverrides or the profile, or ask who runs the cluster about the "
        "policy",
    ),
    Wait(
        _C.ADMISSION_REJECTED,
        "unanswered",
        "an admission webhook did not answer",
        "ask who runs the cluster to look at the webhook that the message names; the job goes on by itself when it "
        "answers",
    ),
    Wait(
        _C.MISSING_SECRET,
        "",
        "a Secret, or a key in it, does not exist",
        "create Secret {name} with the keys that the message names, or correct spec.credentials.secretRef; the pod "
        "goes on by itself",
    ),
    Wait(
        _C.MISSING_SECRET,
        "pull",
        "the Secret for pulling the image does not exist",
        "create Secret {name} of type kubernetes.io/dockerconfigjson, or correct spec.podOverrides.imagePullSecrets",
    ),
    Wait(
        _C.MISSING_PERSISTENT_VOLUME_CLAIM,
        "",
        "a PersistentVolumeClaim does not exist",
        "create PersistentVolumeClaim {name} in namespace {namespace}, or correct the pvc:// location in spec.dataset, "
        "spec.model or spec.output; the pod goes on by itself",
    ),
    Wait(
        _C.VOLUME_BINDING,
        "",
        "a PersistentVolumeClaim is not bound to a volume that this pod can use",
        "look at what the claim waits for: kubectl describe persistentvolumeclaim --namespace {namespace}",
    ),
    Wait(
        _C.VOLUME_BINDING,
        "zone",
        "the claim's volume can only be used from nodes that this pod may not run on",
        "use a claim whose volume is in the zone of the profile's nodes, or a bucket: "
        "kubectl describe persistentvolumeclaim --namespace {namespace}",
    ),
    Wait(
        _C.VOLUME_BINDING,
        "attached",
        "the volume is attached to another node",
        "stop the pod that uses the claim on the other node (kubectl get pods --namespace {namespace} --output wide), "
        "or use a ReadWriteMany claim or a bucket",
    ),
    Wait(
        _C.MOUNT_FAILED,
        "",
        "a volume of the pod cannot be mounted",
        "look at the events of the pod: kubectl describe pod {pod} --namespace {namespace}",
    ),
    Wait(
        _C.IMAGE_PULL_FAILED,
        "",
        "the trainer's image cannot be pulled",
        "check the profile's image and spec.podOverrides.imagePullSecrets",
    ),
    Wait(
        _C.IMAGE_PULL_FAILED,
        "not found",
        "the registry has no such image",
        "correct the profile's image or push it: {image}",
    ),
    Wait(
        _C.IMAGE_PULL_FAILED,
        "unauthorized",
        "the registry refuses to give the image (or hides that it does not exist)",
        "name a Secret that may pull {image} in spec.podOverrides.imagePullSecrets, and check the image's name",
    ),
    Wait(
        _C.IMAGE_PULL_FAILED,
        "rate limit",
        "the registry gives no more images for a while",
        "use a mirror or registry of your own in the profile's image, or pull with an account: "
        "spec.podOverrides.imagePullSecrets; it is tried again by itself",
    ),
    Wait(
        _C.IMAGE_PULL_FAILED,
        "name",
        "the image's name is malformed",
        "correct the profile's image: {image}",
    ),
    Wait(
        _C.IMAGE_PULL_FAILED,
        "unreachable",
        "the node cannot reach the registry",
        "check the registry's name in the profile's image, and ask who runs the cluster about the nodes' way to the "
        "registry; it is tried again by itself",
    ),
    Wait(
        _C.IMAGE_PULL_FAILED,
        "platform",
        "the image was not built for the node's processor",
        "build {image} for the nodes' platform, or correct the profile's nodeAffinity (kubernetes.io/arch)",
    ),
    Wait(
        _C.IMAGE_PULL_FAILED,
        "disk",
        "the node has no disk space left for the image",
        "ask who runs the cluster for nodes with a larger disk, or free images on node {node}",
    ),
    Wait(
        _C.CONTAINER_CONFIG_ERROR,
        "",
        "the node cannot create the container",
        "correct what the message names in spec.podOverrides or the profile: kubectl describe pod {pod} "
        "--namespace {namespace}",
    ),
    Wait(
        _C.SANDBOX_FAILED,
        "",
        "the node cannot set up the pod's network or sandbox",
        "ask who runs the cluster to look at the network plugin on node {node}: kubectl describe pod {pod} "
        "--namespace {namespace}",
    ),
    Wait(
        _C.SANDBOX_FAILED,
        "addresses",
        "there are no IP addresses left for pods",
        "ask who runs the cluster to enlarge the pods' address range, or stop pods on node {node}",
    ),
    Wait(
        _C.SANDBOX_FAILED,
        "runtime",
        "the node's container runtime does not know the runtime class",
        "ask who runs the cluster to install the runtime (for nvidia: the NVIDIA container toolkit) on node {node}, or "
        "to correct the profile's runtimeClassName",
    ),
    Wait(
        _C.QUEUE_MISSING,
        "",
        "the Kueue queue does not exist",
        "correct the label kueue.x-k8s.io/queue-name; list the queues with kubectl get localqueues "
        "--namespace {namespace}",
    ),
    Wait(
        _C.QUEUE_MISSING,
        "namespace",
        "the Kueue ClusterQueue does not take jobs from this namespace",
        "use another queue in the label kueue.x-k8s.io/queue-name, or ask who runs the cluster to change the "
        "ClusterQueue's namespaceSelector",
    ),
    Wait(
        _C.QUEUE_STOPPED,
        "",
        "the Kueue queue is stopped",
        "ask who runs the queue when it starts again, or use another one in the label kueue.x-k8s.io/queue-name",
    ),
    Wait(
        _C.WORKLOAD_DEACTIVATED,
        "",
        "Kueue has taken the job out of its queue",
        "set spec.active: true again: kubectl edit workload {workload} --namespace {namespace}; the message says why "
        "it was taken out",
    ),
    Wait(
        _C.QUEUE_MISCONFIGURED,
        "",
        "Kueue cannot judge the job as it or its queue is",
        "correct the job's resources as the message says, or ask who runs the queue: kubectl describe workload "
        "{workload} --namespace {namespace}",
    ),
    Wait(
        _C.EXCEEDS_MAX_QUOTA,
        "",
        "the job asks for more than the whole quota of its queue",
        "lower spec.resources.gpusPerNode or spec.resources.nodes, or use a larger queue in the label "
        "kueue.x-k8s.io/queue-name",
    ),
    Wait(
        _C.NO_MATCHING_FLAVOR,
        "",
        "no flavor of the queue offers what the profile asks for",
        "use a profile that the queue offers in spec.resources.profile, or another queue: kubectl get resourceflavors",
    ),
    Wait(
        _C.TOPOLOGY_PLACEMENT_FAILED,
        "",
        "Kueue finds no place that satisfies the topology",
        "lower spec.resources.nodes, or wait for neighbouring nodes to become free: kubectl describe workload "
        "{workload} --namespace {namespace}",
    ),
    Wait(
        _C.WAITING_FOR_ADMISSION_CHECK,
        "",
        "quota is reserved, and an admission check of the queue has not passed",
        "look at the check: kubectl describe workload {workload} --namespace {namespace}",
    ),
    Wait(
        _C.WAITING_FOR_PODS_READY,
        "",
        "Kueue admits nothing until the pods of jobs before it are ready",
        "wait, or look at the jobs before this one: kubectl get workloads --all-namespaces",
    ),
    Wait(
        _C.WAITING_FOR_QUOTA,
        "",
        "other jobs use the queue's quota",
        "wait, or raise the priority with the label kueue.x-k8s.io/priority-class, or use another queue: kubectl get "
        "workloads --namespace {namespace}",
    ),
    Wait(
        _C.GATED,
        "",
        "the pod has scheduling gates",
        "ask the owner of {gates} to remove it from the pod: kubectl get pod {pod} --namespace {namespace} "
        "--output yaml",
    ),
    Wait(
        _C.GATED,
        "queue",
        "Kueue holds the pod back, and its Workload is not to be seen",
        "check that Kueue runs: kubectl get pods --namespace kueue-system; and that the WorkloadPriorityClass in the "
        "label kueue.x-k8s.io/priority-class exists: kubectl get workloadpriorityclasses",
    ),
    Wait(
        _C.NO_SUCH_NODE,
        "",
        "no node of the cluster has the resource",
        "add nodes with {resource}, or use another profile in spec.resources.profile: kubectl get trainingprofiles",
    ),
    Wait(
        _C.NO_SUCH_NODE,
        "plugin",
        "nodes have the profile's labels and do not report the resource",
        "ask who runs the cluster to look at the device plugin and driver on node {node}: kubectl describe node {node}",
    ),
    Wait(
        _C.NO_SUCH_NODE,
        "size",
        "no node has as many GPUs as one pod asks for",
        "lower spec.resources.gpusPerNode to {most} or less (and raise spec.resources.nodes to make up for it)",
    ),
    Wait(
        _C.NO_SUCH_NODE,
        "cpu",
        "no node is large enough even when it is empty",
        "ask who runs the cluster to lower the profile's perGpu {short}, or lower spec.resources.gpusPerNode",
    ),
    Wait(
        _C.TAINT_OR_SELECTOR_MISMATCH,
        "",
        "no node has the labels that the pod asks for",
        "use another profile or capacity in spec.resources, correct spec.podOverrides.nodeSelector, or ask who runs "
        "the cluster to correct the profile's nodeAffinity",
    ),
    Wait(
        _C.TAINT_OR_SELECTOR_MISMATCH,
        "taint",
        "the nodes that fit carry a taint that the pod does not tolerate",
        "add a toleration for {taint} to spec.podOverrides.tolerations, or ask who runs the cluster to add it to the "
        "profile's tolerations",
    ),
    Wait(
        _C.TAINT_OR_SELECTOR_MISMATCH,
        "excluded",
        "the nodes that fit are avoided for a while, because an attempt failed there",
        "wait until the times in status.excludedNodes have passed, or ask who runs the cluster to add nodes or to look "
        "at these: kubectl get diffusiontrainingjob --namespace {namespace} --output yaml",
    ),
    Wait(
        _C.TAINT_OR_SELECTOR_MISMATCH,
        "affinity",
        "rules about other pods keep the pod from every node that fits",
        "look at what the pod's affinity or spread rules ask for: kubectl get pod {pod} --namespace {namespace} "
        "--output yaml",
    ),
    Wait(
        _C.SPOT_UNAVAILABLE,
        "",
        "the cloud has no spot machine of this kind to give at the moment",
        "set spec.resources.capacity: OnDemand or Any, or use another profile; the autoscaler tries again by itself",
    ),
    Wait(
        _C.CAPACITY_UNAVAILABLE,
        "",
        "the cloud has no machine of this kind to give at the moment",
        "use another profile or zone, or a reservation; with spec.resources.alternatives a job moves on by itself",
    ),
    Wait(
        _C.AUTOSCALER_REFUSED,
        "",
        "the autoscaler adds no node for the pod",
        "ask who runs the cluster to look at the autoscaler's reason, or use another profile in spec.resources.profile",
    ),
    Wait(
        _C.AUTOSCALER_REFUSED,
        "limit",
        "the node group or NodePool is as large as it may be",
        "wait for other jobs to end, or ask who runs the cluster to raise the maximum size or limits of the node group",
    ),
    Wait(
        _C.AUTOSCALER_REFUSED,
        "size",
        "no machine type of the autoscaler is large enough for the pod",
        "lower spec.resources.gpusPerNode, or ask who runs the cluster to allow larger machine types or to lower the "
        "profile's perGpu",
    ),
    Wait(
        _C.AUTOSCALER_REFUSED,
        "quota",
        "the cloud account's quota does not allow another node",
        "ask who runs the cluster to raise the cloud quota for this machine type, or use another profile",
    ),
    Wait(
        _C.AUTOSCALER_REFUSED,
        "late",
        "the autoscaler wanted to add a node, and none has come",
        "ask who runs the cluster to look at the autoscaler's log and the cloud's quota; use another profile meanwhile",
    ),
    Wait(
        _C.NODE_NOT_READY,
        "",
        "the nodes that fit are not ready",
        "ask who runs the cluster to look at node {node}: kubectl describe node {node}",
    ),
    Wait(
        _C.NODE_CORDONED,
        "",
        "the nodes that fit are cordoned or about to leave",
        "wait until the maintenance is over, or uncordon the node if it was forgotten: kubectl uncordon {node}",
    ),
    Wait(
        _C.INSUFFICIENT_CPU_OR_MEMORY,
        "",
        "GPUs are free where CPU, memory, local disk or room for pods is not",
        "ask who runs the cluster to lower the profile's perGpu {short}, or stop the pods that use it on node {node}",
    ),
    Wait(
        _C.FRAGMENTED,
        "",
        "enough GPUs are free in all, and not on one node",
        "lower spec.resources.gpusPerNode to {most} and raise spec.resources.nodes, or wait for a whole node to become "
        "free",
    ),
    Wait(
        _C.INSUFFICIENT_GPU,
        "",
        "other pods use the GPUs of all nodes that fit",
        "wait, or use another profile in spec.resources.profile, or add nodes",
    ),
    Wait(
        _C.GANG_INCOMPLETE,
        "",
        "the pods of the job start together or not at all, and some cannot yet",
        "wait, or lower spec.resources.nodes: kubectl get pods --namespace {namespace}",
    ),
    Wait(
        _C.PREEMPTING_OTHERS,
        "",
        "pods of lower priority are being stopped to make room",
        "wait until they have stopped: kubectl get events --namespace {namespace}",
    ),
    Wait(
        _C.NODE_PROVISIONING,
        "",
        "the autoscaler adds a node",
        "wait; GPU nodes take some minutes: kubectl get nodes --watch",
    ),
    Wait(
        _C.UNKNOWN,
        "",
        "none of the known causes",
        "look at the pod: kubectl describe pod {pod} --namespace {namespace}",
    ),
    Wait(
        _C.UNKNOWN,
        "scheduler",
        "no scheduler has looked at the pod",
        "check that scheduler {scheduler} runs, or correct spec.podOverrides.schedulerName",
    ),
    Wait(
        _C.IMAGE_PULL,
        "",
        "the node pulls the trainer's image",
        "wait; the next job on this node finds it there: kubectl get events --namespace {namespace}",
    ),
    Wait(
        _C.IMAGE_PULL,
        "slow",
        "the node pulls the trainer's image, and it takes long",
        "use a registry in the cluster's region in the profile's image, or ask who runs the cluster to preload it",
    ),
    Wait(
        _C.STARTING,
        "",
        "nothing stands in its way; it starts",
        "wait; look at the pod if it lasts: kubectl describe pod {pod} --namespace {namespace}",
    ),
)

OF_WAIT: dict[tuple[WaitingCause, str], Wait] = {(wait.cause, wait.variant): wait for wait in WAITS}


class _Found(defaultdict[str, str]):
    def __missing__(self, key: str) -> str:
        return f"<{key}>"


def hint(cause: WaitingCause, variant: str = "", **found: str) -> str:
    """Return what can be done; what was not found is shown as `<name>`."""
    return OF_WAIT[cause, variant].hint.format_map(_Found(str, found))
