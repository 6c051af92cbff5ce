{{/* The config, in which every pool and the routers take a custom resource that only their own pods offer, and which
     names the files of the Secrets that moesaic.podTemplate mounts. */}}
{{- define "moesaic.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $pools := list -}}
{{- range $config.pools -}}
{{- $name := .name | default "default" -}}
{{- $pools = append $pools (set . "resources" (dict (printf "pool-%s" $name) 1)) -}}
{{- end -}}
{{- $router := set ($config.router | default dict) "resources" (dict "routers" 1) -}}
{{- if .Values.tls.doorsSecret -}}
{{- $_ := set $config "tls" (dict "certificate" "/etc/moesaic/doors/tls.crt" "key" "/etc/moesaic/doors/tls.key") -}}
{{- end -}}
{{- if .Values.tls.clusterSecret -}}
{{- $_ := set $config "cluster_tls" (dict "certificate" "/etc/moesaic/cluster/tls.crt" "key" "/etc/moesaic/cluster/tls.key" "ca" "/etc/moesaic/cluster/ca.crt") -}}
{{- end -}}
{{- toYaml (set (set $config "pools" $pools) "router" $router) -}}
{{- end -}}

{{/* Fails with what to mend where values contradict each other, which the schema cannot see. */}}
{{- define "moesaic.check" -}}
{{- $pools := list -}}
{{- range .Values.config.pools -}}{{- $pools = append $pools (.name | default "default") -}}{{- end -}}
{{- $groups := list -}}
{{- range .Values.workers -}}{{- $groups = append $groups .pool -}}{{- end -}}
{{- if ne (join "," $pools) (join "," $groups) -}}
{{- fail (printf "config.pools are %v and workers are of %v: give each pool one entry of workers, in the same order" $pools $groups) -}}
{{- end -}}
{{- if has "routers" $pools -}}{{- fail "config.pools: the name `routers` is that of the routers' own pods: take another" -}}{{- end -}}
{{- $dtype := .Values.config.model.dtype | default "bfloat16" -}}
{{- range .Values.workers -}}
{{- if .accelerator -}}
{{- $kind := get $.Values.accelerators .accelerator -}}
{{- if not $kind -}}
{{- fail (printf "workers of pool %s: accelerator %s is not among accelerators %v: add --values k8s/accelerators/%s.yaml" .pool .accelerator (keys $.Values.accelerators) .accelerator) -}}
{{- end -}}
{{- if and $kind.dtypes (not (has $dtype $kind.dtypes)) -}}
{{- fail (printf "workers of pool %s: %s computes in %v, and config.model.dtype is %s: set it to one of them" .pool .accelerator $kind.dtypes $dtype) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if le (int .Values.termination.graceSeconds) (int .Values.termination.drainSeconds) -}}
{{- fail "termination.graceSeconds must be above drainSeconds, or Kubernetes kills what still drains" -}}
{{- end -}}
{{- if eq .Values.upgrade.type "NewClusterWithIncrementalUpgrade" -}}
{{- if not (and .Values.autoscaling.enabled .Values.upgrade.gatewayClassName) -}}
{{- fail "upgrade.type NewClusterWithIncrementalUpgrade needs autoscaling.enabled and upgrade.gatewayClassName" -}}
{{- end -}}
{{- end -}}
{{- $access := .Values.config.access | default dict -}}
{{- if and $access.keys (not $access.database) -}}
{{- fail "config.access.keys: routers are in several pods, so set config.access.database to postgresql://user@host/name, and database.passwordSecret" -}}
{{- end -}}
{{- if and .Values.models.download.enabled (not .Values.models.claimName) -}}
{{- fail "models.download.enabled needs models.claimName, a claim that the Job may write to" -}}
{{- end -}}
{{- if and .Values.models.download.enabled .Values.models.download.s3.source (not (hasPrefix (printf "%s/" .Values.models.mountPath) .Values.config.model.path)) -}}
{{- fail (printf "models.download.s3 fills a folder of the claim, and config.model.path is %s: set it to %s/NAME" .Values.config.model.path .Values.models.mountPath) -}}
{{- end -}}
{{- end -}}
