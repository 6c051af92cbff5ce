{{- define "moesaic.name" -}}
{{- .Values.nameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* What Services, policies and budgets select by. Arguments: the top, a component. */}}
{{- define "moesaic.selector" -}}
app.kubernetes.io/instance: {{ include "moesaic.name" (index . 0) | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "moesaic.metadata" -}}
name: {{ index . 1 }}
namespace: {{ (index . 0).Release.Namespace }}
labels:
  app.kubernetes.io/name: moesaic
  app.kubernetes.io/instance: {{ include "moesaic.name" (index . 0) | quote }}
  app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
  helm.sh/chart: {{ (index . 0).Chart.Name }}-{{ (index . 0).Chart.Version }}
{{- end -}}

{{- define "moesaic.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "moesaic.name" .) -}}
{{- end -}}

{{- define "moesaic.image" -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end -}}

{{/* Ports: of the config, or its defaults (serving/config.py). */}}
{{- define "moesaic.httpPort" -}}{{ .Values.config.http_port | default 8000 | int }}{{- end -}}
{{- define "moesaic.grpcPort" -}}{{ (.Values.config.router | default dict).grpc_port | default 9000 | int }}{{- end -}}
{{- define "moesaic.proxyPort" -}}{{ .Values.config.proxy_port | default 8100 | int }}{{- end -}}
{{- define "moesaic.prefix" -}}{{ .Values.config.route_prefix | default "/" | trimSuffix "/" }}{{- end -}}
