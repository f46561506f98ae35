"""What has to hold of Kubernetes manifests and no schema says: each rule tells what breaks it.

In: the objects of one rendered overlay, as plain values. Out: for each rule the sentences about what is wrong; none is
right. They are what `test_manifests.py` applies to the overlays, and to overlays with a fault in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Object = Mapping[str, Any]
Objects = list[dict[str, Any]]

_QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")
_UNITS = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN$|API_KEY|ACCESS_KEY|CREDENTIAL")


def amount(quantity: str) -> float:
    """A quantity as a number: cores, bytes or pieces."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity)
    assert found, quantity
    return float(found[1]) * _UNITS[found[2]]


def of_kind(objects: Objects, kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind by name."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def pods(objects: Objects) -> dict[str, dict[str, Any]]:
    """Pod templates by the name of their Deployment."""
    return {name: one["spec"]["template"] for name, one in of_kind(objects, "Deployment").items()}


def containers(pod: Object) -> list[dict[str, Any]]:
    """All containers of a pod template, those first that run before the others."""
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def _each(objects: Objects) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, pod in pods(objects).items():
        for container in containers(pod):
            yield f"{name}/{container['name']}", pod["spec"], container


def unpinned_images(objects: Objects) -> Iterator[str]:
    """An image may be another one tomorrow."""
    for where, _, container in _each(objects):
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        if not tag or tag.startswith("latest"):
            yield f"{where}: image {container['image']}"


def unrestricted(objects: Objects) -> Iterator[str]:
    """More than PodSecurity `restricted` allows, a root file system that can be written, or a token nobody needs."""
    for name, pod in pods(objects).items():
        spec = pod["spec"]
        context = spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or context.get("runAsUser", 0) < 10000:
            yield f"{name}: may be root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name}: no seccomp profile"
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{name}: shares the node's namespaces"
        if "automountServiceAccountToken" not in spec:
            yield f"{name}: does not say whether it needs an API token"
        for volume in spec.get("volumes", ()):
            kinds = volume.keys() - {"name"}
            if not kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "projected"}:
                yield f"{name}: volume {volume['name']} is {kinds}"
    for where, _, container in _each(objects):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{where}: may gain privileges"
        if context.get("capabilities", {}).get("drop") != ["ALL"] or context.get("capabilities", {}).get("add"):
            yield f"{where}: keeps capabilities"
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{where}: root file system can be written"


def dangling(objects: Objects) -> Iterator[str]:
    """A name that nothing has: a mount without a volume, a claim, account, class or port that is not there."""
    maps, claims = of_kind(objects, "ConfigMap"), of_kind(objects, "PersistentVolumeClaim")
    for name, pod in pods(objects).items():
        spec = pod["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        mounted = {mount["name"] for one in containers(pod) for mount in one.get("volumeMounts", ())}
        yield from (f"{name}: mount {one} has no volume" for one in sorted(mounted - volumes.keys()))
        yield from (f"{name}: volume {one} is not mounted" for one in sorted(volumes.keys() - mounted))
        for volume in volumes.values():
            if "configMap" in volume and volume["configMap"]["name"] not in maps:
                yield f"{name}: no ConfigMap {volume['configMap']['name']}"
            if "persistentVolumeClaim" in volume and volume["persistentVolumeClaim"]["claimName"] not in claims:
                yield f"{name}: no claim {volume['persistentVolumeClaim']['claimName']}"
        if spec.get("serviceAccountName") not in of_kind(objects, "ServiceAccount"):
            yield f"{name}: no account {spec.get('serviceAccountName')}"
        if spec.get("priorityClassName") not in of_kind(objects, "PriorityClass"):
            yield f"{name}: no priority class {spec.get('priorityClassName')}"
    for where, _, container in _each(objects):
        for source in container.get("envFrom", ()):
            if "configMapRef" in source and source["configMapRef"]["name"] not in maps:
                yield f"{where}: no ConfigMap {source['configMapRef']['name']}"
        ports = {port["name"] for port in container.get("ports", ())}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = container.get(kind, {}).get("httpGet", {}).get("port")
            if port is not None and port not in ports:
                yield f"{where}: {kind} asks port {port}"
    for name, service in of_kind(objects, "Service").items():
        selector = service["spec"]["selector"]
        chosen = [pod for pod in pods(objects).values() if selector.items() <= pod["metadata"]["labels"].items()]
        names = {port["name"] for pod in chosen for one in containers(pod) for port in one.get("ports", ())}
        for port in service["spec"].get("ports", ()):
            if port["targetPort"] not in names:
                yield f"Service {name}: no pod has the port {port['targetPort']}"


def unwatched(objects: Objects) -> Iterator[str]:
    """A container that hangs or is not ready, and nobody sees it."""
    for name, pod in pods(objects).items():
        for container in pod["spec"]["containers"]:
            wanted = {"startupProbe", "livenessProbe"} | ({"readinessProbe"} if container.get("ports") else set())
            yield from (f"{name}/{container['name']}: no {kind}" for kind in sorted(wanted - container.keys()))


def unbounded(objects: Objects) -> Iterator[str]:
    """A container that may take any amount, a quantity that is none, or a request above its limit."""
    for where, _, container in _each(objects):
        requests = container.get("resources", {}).get("requests", {})
        limits = container.get("resources", {}).get("limits", {})
        for key in ("cpu", "memory", "ephemeral-storage"):
            if key not in requests:
                yield f"{where}: requests no {key}"
            if key != "cpu" and key not in limits:
                yield f"{where}: no limit of {key}"
        bad = [
            (key, quantity)
            for key, quantity in [*requests.items(), *limits.items()]
            if not isinstance(quantity, str) or not _QUANTITY.match(quantity)
        ]
        yield from (f"{where}: {key}={quantity!r} is no quantity" for key, quantity in bad)
        for key in requests.keys() & limits.keys() - {key for key, _ in bad}:
            if amount(requests[key]) > amount(limits[key]):
                yield f"{where}: {key} requests more than its limit"
    for name, pod in pods(objects).items():
        for volume in pod["spec"].get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{name}: volume {volume['name']} has no sizeLimit"


def written_secrets(objects: Objects) -> Iterator[str]:
    """A secret whose value stands in the manifests, which are in git and readable by all in the namespace."""
    yield from (f"Secret {name} is part of the manifests" for name in of_kind(objects, "Secret"))
    values = [
        (where, variable["name"], variable["value"])
        for where, _, container in _each(objects)
        for variable in container.get("env", ())
        if "value" in variable
    ]
    values += [
        (f"ConfigMap {name}", key, value)
        for name, one in of_kind(objects, "ConfigMap").items()
        for key, value in one["data"].items()
    ]
    for where, key, value in values:
        if _SECRET_NAME.search(key) or re.search(r"://[^\s/:@]*:[^\s/@]+@", value):
            yield f"{where}: {key} holds a secret"


RULES = (unpinned_images, unrestricted, dangling, unwatched, unbounded, written_secrets)


def conversations(objects: Objects) -> set[tuple[str, str, int | str]]:
    """Who may talk to whom, at which port, by the NetworkPolicies; a peer outside is its kind of address.

    Between two components both sides have to allow it. A component is the label of that name; ``stage`` are the pods
    that dispatch makes.
    """
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods(objects).values()} | {
        "stage"
    }
    policies = list(of_kind(objects, "NetworkPolicy").values())
    allowed: dict[str, set[tuple[str, str, int | str]]] = {"Ingress": set(), "Egress": set()}
    for policy in policies:
        spec = policy["spec"]
        for component in components:
            if not _chooses(spec["podSelector"], component):
                continue
            for direction, rules, peers in (("Ingress", "ingress", "from"), ("Egress", "egress", "to")):
                for rule in spec.get(rules, ()):
                    for peer in rule.get(peers, [{}]):
                        for port in rule.get("ports", [{"port": "any"}]):
                            for other in _peers(peer, components):
                                pair = (other, component) if direction == "Ingress" else (component, other)
                                allowed[direction].add((*pair, port["port"]))
    inside = allowed["Ingress"] & allowed["Egress"]
    outside = {edge for edges in allowed.values() for edge in edges if not {edge[0], edge[1]} <= components}
    return inside | outside


def denied_by_default(objects: Objects) -> bool:
    """Whether a policy for all pods of the namespace forbids what no other allows, in and out."""
    return any(
        one["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        for one in of_kind(objects, "NetworkPolicy").values()
    )


def _chooses(selector: Object, component: str) -> bool:
    labels = {"app.kubernetes.io/component": component}
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(
        expression["operator"] == "In" and labels.get(expression["key"]) in expression["values"]
        for expression in selector.get("matchExpressions", ())
    )


def _peers(peer: Object, components: set[str]) -> Iterator[str]:
    if not peer:
        yield "anywhere"
    elif "ipBlock" in peer:
        yield "internet" if peer["ipBlock"]["cidr"] == "0.0.0.0/0" else "private addresses"
    elif "namespaceSelector" in peer:
        yield "+".join(f"{key}={value}" for key, value in peer["namespaceSelector"]["matchLabels"].items())
    else:
        yield from (one for one in components if _chooses(peer["podSelector"], one))
