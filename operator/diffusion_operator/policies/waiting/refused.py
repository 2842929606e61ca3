"""The API server refused to create a pod: its sentence says why (apiserver and admission plug-ins, v1.36)."""

from __future__ import annotations

import re

from diffusion_api.waiting import WaitingCause
from diffusion_operator.policies.waiting.facts import Diagnosis, diagnosis

_QUOTA = re.compile(r"exceeded quota: ([^,\s]{1,253})")
_ACCOUNT = re.compile(r"error looking up service account \S+?/([^\s:]{1,253}): .*not found")
_PRIORITY = re.compile(r"no PriorityClass with name (\S{1,253}) was found")
_RUNTIME = re.compile(r"RuntimeClass \"?([^\"\s]{1,253})\"? not found")


def why_refused(message: str, *, namespace: str) -> Diagnosis:
    """Return what the API server's answer to a pod's creation means."""
    found = _QUOTA.search(message)
    if found is not None:
        return diagnosis(WaitingCause.QUOTA_EXCEEDED, message, quota=found[1], namespace=namespace)
    if "violates PodSecurity" in message:
        return diagnosis(WaitingCause.POD_SECURITY_REJECTED, message, namespace=namespace)
    for pattern, cause in (
        (_ACCOUNT, WaitingCause.MISSING_SERVICE_ACCOUNT),
        (_PRIORITY, WaitingCause.MISSING_PRIORITY_CLASS),
        (_RUNTIME, WaitingCause.MISSING_RUNTIME_CLASS),
    ):
        found = pattern.search(message)
        if found is not None:
            return diagnosis(cause, message, name=found[1], namespace=namespace)
    variant = "unanswered" if "failed calling webhook" in message else ""
    return diagnosis(WaitingCause.ADMISSION_REJECTED, message, variant)
