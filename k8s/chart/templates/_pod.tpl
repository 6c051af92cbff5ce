{{/* A pod template of KubeRay. Keys of the argument: top, group (its values), kind (accelerator, or empty), component,
     container (its name), readiness (a probe), preStop (a shell line). */}}
{{- define "moesaic.podTemplate" -}}
{{- $top := .top -}}{{- $group := .group -}}{{- $kind := .kind | default dict -}}
{{- $isHead := eq .component "head" -}}
metadata:
  labels:
    {{- include "moesaic.selector" (list $top .component) | nindent 4 }}
    {{- with $group.labels }}{{ toYaml . | nindent 4 }}{{- end }}
  {{- with $group.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "moesaic.serviceAccount" $top }}
  automountServiceAccountToken: {{ and $isHead $top.Values.autoscaling.enabled }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $top.Values.termination.graceSeconds }}
  securityContext:
    {{- toYaml ($group.podSecurityContext | default $top.Values.podSecurityContext) | nindent 4 }}
  {{- with $top.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with merge (dict) ($group.nodeSelector | default dict) ($kind.nodeSelector | default dict) }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with concat ($group.tolerations | default list) ($kind.tolerations | default list) }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.runtimeClassName | default $kind.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  containers:
    - name: {{ .container }}
      {{- $image := $group.image | default $kind.image | default $top.Values.image }}
      image: {{ include "moesaic.image" $image | quote }}
      imagePullPolicy: {{ $image.pullPolicy | default "IfNotPresent" }}
      {{- include "moesaic.ports" (list $top .component) | nindent 6 }}
      env:
        {{- include "moesaic.env" (list $top .component) | nindent 8 }}
        {{- with concat $top.Values.env ($kind.env | default list) ($group.env | default list) }}{{ toYaml . | nindent 8 }}{{- end }}
      resources:
        {{- include "moesaic.resources" (list $group $kind) | nindent 8 }}
      securityContext:
        {{- $security := deepCopy ($group.securityContext | default $top.Values.securityContext) }}
        {{- if $group.ipcLock }}{{- $_ := set (set $security "capabilities" ($security.capabilities | default dict)).capabilities "add" (list "IPC_LOCK") }}{{- end }}
        {{- toYaml $security | nindent 8 }}
      readinessProbe:
        {{- .readiness | nindent 8 }}
      livenessProbe:
        {{- include "moesaic.raylet" $isHead | nindent 8 }}
        initialDelaySeconds: 60
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      {{- with .preStop }}
      lifecycle:
        preStop:
          exec:
            command: [/bin/sh, -c, {{ . | quote }}]
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/ray}
        - {name: shm, mountPath: /dev/shm}
        {{- if $top.Values.models.claimName }}
        - {name: models, mountPath: {{ $top.Values.models.mountPath | quote }}, readOnly: true}
        {{- end }}
        {{- range $folder, $secret := include "moesaic.certificates" (list $top .component) | fromYaml }}
        - {name: {{ $folder }}-certificate, mountPath: /etc/moesaic/{{ $folder }}, readOnly: true}
        {{- end }}
        {{- with $group.volumeMounts }}{{ toYaml . | nindent 8 }}{{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: home, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $group.shmSize | default $kind.shmSize | default "2Gi" }}}}
    {{- if $top.Values.models.claimName }}
    - {name: models, persistentVolumeClaim: {claimName: {{ $top.Values.models.claimName | quote }}, readOnly: true}}
    {{- end }}
    {{- range $folder, $secret := include "moesaic.certificates" (list $top .component) | fromYaml }}
    - {name: {{ $folder }}-certificate, secret: {secretName: {{ $secret | quote }}, defaultMode: 0440}}
    {{- end }}
    {{- with $group.volumes }}{{ toYaml . | nindent 4 }}{{- end }}
{{- end -}}

{{/* Folders below /etc/moesaic and the Secrets in them. Whole folders, no subPath: that would never be renewed. */}}
{{- define "moesaic.certificates" -}}
{{- $top := index . 0 -}}{{- $component := index . 1 -}}
{{- $found := dict -}}
{{- if and $top.Values.tls.doorsSecret (eq $component "router") -}}{{- $_ := set $found "doors" $top.Values.tls.doorsSecret -}}{{- end -}}
{{- if and $top.Values.tls.clusterSecret (ne $component "head") -}}{{- $_ := set $found "cluster" $top.Values.tls.clusterSecret -}}{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* KubeRay takes the port of Ray Serve's proxies from the name `serve`. */}}
{{- define "moesaic.ports" -}}
{{- $top := index . 0 -}}
ports:
  - {name: serve, containerPort: {{ include "moesaic.proxyPort" $top }}}
  - {name: metrics, containerPort: 8080}
  {{- if eq (index . 1) "router" }}
  - {name: http, containerPort: {{ include "moesaic.httpPort" $top }}}
  - {name: grpc, containerPort: {{ include "moesaic.grpcPort" $top }}}
  {{- else if eq (index . 1) "head" }}
  - {name: gcs-server, containerPort: 6379}
  - {name: dashboard, containerPort: 8265}
  - {name: client, containerPort: 10001}
  {{- end }}
{{- end -}}

{{/* USER: Ray asks for a name, which a random user id does not have. */}}
{{- define "moesaic.env" -}}
{{- $top := index . 0 -}}
- {name: HOME, value: /home/ray}
- {name: USER, value: ray}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- if $top.Values.models.download.enabled }}
- {name: HF_HOME, value: {{ printf "%s/huggingface" $top.Values.models.mountPath | quote }}}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: MODELSCOPE_CACHE, value: {{ printf "%s/modelscope" $top.Values.models.mountPath | quote }}}
{{- else }}
{{- include "moesaic.hubToken" $top }}
{{- end }}
{{- with $top.Values.database.passwordSecret }}
{{- if and .name (ne (index $ 1) "shard") }}
- {name: PGPASSWORD, valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key | default "password" }}}}}
{{- with ($top.Values.config.access | default dict).database }}
- {name: MOESAIC_DATABASE, value: {{ . | quote }}}
{{- end }}
{{- end }}
{{- end }}
{{- with $top.Values.tracing.headersSecret }}
{{- if and .name (ne (index $ 1) "head") }}
- {name: OTEL_EXPORTER_OTLP_HEADERS, valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key | default "headers" }}}}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "moesaic.hubToken" -}}
{{- with .Values.models.download.tokenSecret }}
{{- if .name }}
- {name: {{ if hasPrefix "modelscope://" $.Values.config.model.path }}MODELSCOPE_API_TOKEN{{ else }}HF_TOKEN{{ end }}, valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key | default "token" }}}}}
{{- end }}
{{- end }}
{{- end -}}

{{/* An accelerator is asked for once, unless the group's own resources name it. */}}
{{- define "moesaic.resources" -}}
{{- $resources := deepCopy (index . 0).resources -}}
{{- $resource := (index . 1).resource -}}
{{- if $resource -}}
{{- range $part := list "requests" "limits" -}}
{{- $_ := set $resources $part (merge (get $resources $part | default dict) (dict $resource "1")) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Ray's own health addresses need no token. wget, for they are open on this host only. Argument: whether a head. */}}
{{- define "moesaic.raylet" -}}
exec:
  command:
    - /bin/sh
    - -c
    - wget -T 4 -q -O- http://localhost:52365/api/local_raylet_healthz | grep -q success{{ if . }} && wget -T 4 -q -O- http://localhost:8265/api/gcs_healthz | grep -q success{{ end }}
{{- end -}}
