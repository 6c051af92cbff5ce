#!/usr/bin/env bash
# Checks an installed release on a cluster, in ten minutes: k8s/smoke.sh NAMESPACE NAME. Needs kubectl, and curl in a pod.
# With keys, set MOESAIC_KEY. It drains one shard and deletes one router's pod; nothing else is changed.
set -euo pipefail
namespace=${1:?NAMESPACE NAME} name=${2:?NAMESPACE NAME}
kube() { kubectl --namespace "$namespace" "$@"; }
of() { printf 'app.kubernetes.io/instance=%s,app.kubernetes.io/component=%s' "$name" "$1"; }
say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

say "routers and shards become ready"
for component in head router shard; do
    kube wait --for=condition=Ready pod --selector "$(of $component)" --timeout=600s
done
head=$(kube get pod --selector "$(of head)" --output name | head -1)

say "status from the head, without arguments"
kube exec "$head" --container ray-head -- moesaic status

port=$(kube get service "$name-serve" --output 'jsonpath={.spec.ports[?(@.name=="http")].port}')
scheme=$(kube get service "$name-serve" --output 'jsonpath={.spec.ports[?(@.name=="http")].appProtocol}')
outside() {         # a client that is no pod of the release
    kube run "smoke-$RANDOM" --rm --quiet --stdin --restart=Never --image="${SMOKE_IMAGE:-curlimages/curl}" \
        --overrides='{"spec":{"automountServiceAccountToken":false,"securityContext":{"runAsNonRoot":true,"runAsUser":1000,"seccompProfile":{"type":"RuntimeDefault"}}}}' \
        --command -- curl --silent --show-error --max-time 20 "$@"
}
say "a client reaches the routers"
outside --fail --insecure --header "Authorization: Bearer ${MOESAIC_KEY:-none}" "$scheme://$name-serve:$port/v1/models"

say "a client does not reach Ray"
address=$(kube get "$head" --output 'jsonpath={.status.podIP}')
! outside "http://$address:8265/api/version" || fail "the dashboard is open: does the network plugin enforce policies?"

say "the dashboard asks for Ray's token"
code=$(kube exec "$head" --container ray-head -- python -c '
import urllib.error, urllib.request
try:
    print(urllib.request.urlopen("http://localhost:8265/api/serve/applications/").status)
except urllib.error.HTTPError as error:
    print(error.code)')
[ "$code" = 401 ] || fail "the dashboard answered $code without a token"

say "a router's pod goes and comes back"
kube delete "$(kube get pod --selector "$(of router)" --output name | head -1)" --wait=true
kube wait --for=condition=Ready pod --selector "$(of router)" --timeout=300s

say "a shard's pod drains and comes back"
kube delete "$(kube get pod --selector "$(of shard)" --output name | head -1)" --wait=true
sleep 5
kube wait --for=condition=Ready pod --selector "$(of shard)" --timeout=600s
kube exec "$head" --container ray-head -- moesaic status
say "all is well"
