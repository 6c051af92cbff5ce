{{/* The config with a custom resource added to each pool, which only that pool's nodes offer. */}}
{{- define "moesaic.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $pools := list -}}
{{- range $config.pools -}}
{{- if hasKey . "resources" -}}
{{- fail (printf "config.pools[%s].resources: the chart sets it; remove it" .name) -}}
{{- end -}}
{{- $pools = append $pools (set . "resources" (dict (printf "pool-%s" .name) 1)) -}}
{{- end -}}
{{- toYaml (set $config "pools" $pools) -}}
{{- end -}}

{{- define "moesaic.volumeMounts" -}}
{{- if .Values.models.claimName -}}
volumeMounts:
  - {name: models, mountPath: {{ .Values.models.mountPath | quote }}, readOnly: true}
{{- end -}}
{{- end -}}

{{- define "moesaic.volumes" -}}
{{- if .Values.models.claimName -}}
volumes:
  - name: models
    persistentVolumeClaim: {claimName: {{ .Values.models.claimName | quote }}, readOnly: true}
{{- end -}}
{{- end -}}
