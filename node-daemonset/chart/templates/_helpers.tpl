{{- define "helios.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- /* Labels that select a part's pods: (list $ "worker") */}}
{{- define "helios.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: helios
app.kubernetes.io/instance: {{ include "helios.name" $root }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "helios.labels" -}}
{{- $root := index . 0 -}}
{{ include "helios.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- end }}

{{- /* An image of ours: (list $ "worker") */}}
{{- define "helios.image" -}}
{{- $images := (index . 0).Values.images -}}
{{- $repository := required "images.repository is missing: say where the images of node-daemonset/images are (--set images.repository=registry.example/helios)" $images.repository -}}
{{- $tag := $images.tag | default (index . 0).Chart.AppVersion -}}
{{- if eq (index . 1) "keeper" -}}
{{- $tag = $images.keeperTag | default $tag -}}
{{- end -}}
{{ printf "%s/%s:%s" $repository (index . 1) $tag }}
{{- end }}

{{- define "helios.pull" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "helios.root" -}}
{{- .Values.node.root | trimSuffix "/" -}}
{{- end }}
{{- define "helios.mount" -}}
{{ include "helios.root" . }}/mounts/models
{{- end }}
{{- define "helios.keeperSocket" -}}
{{ include "helios.root" . }}/keeper/models.sock
{{- end }}
{{- define "helios.l1" -}}
{{- .Values.worker.tiers.l1.path | default (printf "%s/cache" (include "helios.root" .)) -}}
{{- end }}

{{- /* Settings that values of their own say, which would win unseen: (list "worker.config.mount" map (dict "cache" "worker.tiers.l1.path")) */}}
{{- define "helios.saidElsewhere" -}}
{{- $where := index . 0 }}
{{- $given := index . 1 | default dict }}
{{- range $key, $value := index . 2 }}
{{- if hasKey $given $key }}
{{- fail (printf "%s.%s is said by %s: leave it out there" $where $key $value) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "helios.priorityClass" -}}
{{- if and (not .Values.priorityClass.create) (not .Values.priorityClass.name) -}}
{{- fail "priorityClass.create is false and priorityClass.name is empty: name one that is there, such as system-node-critical" -}}
{{- end -}}
{{- .Values.priorityClass.name | default (printf "%s-node" (include "helios.name" .)) -}}
{{- end }}

{{- /* Of the nodes' pods: theirs, and the taint that nodes have until they are ready. */}}
{{- define "helios.nodeTolerations" -}}
{{- $own := list }}
{{- with .Values.csi.startupTaint }}{{ $own = list (dict "key" . "operator" "Exists") }}{{ end }}
{{- toYaml (concat .Values.node.tolerations $own) }}
{{- end }}

{{- /* Whether the driver changes its node's object: "true" or nothing. */}}
{{- define "helios.changesNode" -}}
{{- if or .Values.csi.startupTaint .Values.csi.nodeLabels }}true{{ end }}
{{- end }}

{{- define "helios.log" -}}
- name: HELIOS_LOG__FORMAT
  value: json
- name: HELIOS_LOG__LEVEL
  value: {{ .Values.logLevel }}
{{- end }}

{{- /* Where the registry is, and what is shown to it. */}}
{{- define "helios.atRegistry" -}}
- name: HELIOS_REGISTRY__URLS
  value: {{ include "helios.registryUrls" . | quote }}
{{- if .Values.registryToken.secret }}
- name: HELIOS_REGISTRY__TOKEN_FILE
  value: /etc/helios/registry-token/{{ .Values.registryToken.key }}
{{- end }}
{{- end }}
{{- define "helios.registryUrls" -}}
{{- if .Values.registryUrls -}}
{{ join "," .Values.registryUrls }}
{{- else if .Values.registry.enabled -}}
http://{{ include "helios.name" . }}-registry.{{ .Release.Namespace }}.svc:{{ .Values.registry.port }}
{{- else -}}
{{ fail "registryUrls is empty and registry.enabled is false: say where the registry is (--set registryUrls={http://registry.example:8470}), or have one (--set registry.enabled=true)" }}
{{- end -}}
{{- end }}
{{- define "helios.registryTokenMount" -}}
{{- if .Values.registryToken.secret }}
- name: registry-token
  mountPath: /etc/helios/registry-token
  readOnly: true
{{- end }}
{{- end }}
{{- define "helios.registryTokenVolume" -}}
{{- if .Values.registryToken.secret }}
- name: registry-token
  secret:
    secretName: {{ .Values.registryToken.secret }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- /* A key of a Secret as a file: (list "admin-tokens" .Values.registry.adminTokens) */}}
{{- define "helios.fileMount" -}}
{{- if (index . 1).secret }}
- name: {{ index . 0 }}
  mountPath: /etc/helios/{{ index . 0 }}
  readOnly: true
{{- end }}
{{- end }}
{{- define "helios.fileVolume" -}}
{{- if (index . 1).secret }}
- name: {{ index . 0 }}
  secret:
    secretName: {{ (index . 1).secret }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- /* What a container needs that needs nothing. */}}
{{- define "helios.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
{{- define "helios.podUser" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- define "helios.sidecarResources" -}}
requests: {cpu: 10m, memory: 32Mi}
limits: {memory: 128Mi}
{{- end }}

{{- /* Replicas apart from one another: (list $ "router" .Values.router.antiAffinity) */}}
{{- define "helios.apart" -}}
affinity:
  podAntiAffinity:
{{- if eq (index . 2) "required" }}
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "helios.selector" . | nindent 12 }}
{{- else }}
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "helios.selector" . | nindent 14 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: topology.kubernetes.io/zone
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "helios.selector" . | nindent 8 }}
{{- end }}

{{- /* Namespaces with an endpoint picker, as a YAML list. */}}
{{- define "helios.pickerNamespaces" -}}
{{- toYaml (.Values.picker.namespaces | default (list (.Values.router.workers.namespace | default .Release.Namespace)) | uniq) }}
{{- end }}

{{- /* Peers of a NetworkPolicy: what names namespaces; of {} every pod of the cluster. */}}
{{- define "helios.fromNamespaces" -}}
- namespaceSelector:
{{- if . }}
    {{- toYaml . | nindent 4 }}
{{- else }} {}
{{- end }}
{{- end }}
{{- define "helios.dns" -}}
- to:
    - namespaceSelector: {}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end }}
{{- define "helios.stores" -}}
- ports:
{{- range .Values.networkPolicy.storePorts }}
    - {protocol: TCP, port: {{ . }}}
{{- end }}
{{- end }}
{{- define "helios.toRegistry" -}}
{{- if .Values.registryUrls }}
- ports:
{{- $ports := list }}
{{- range .Values.registryUrls }}
{{- $host := (urlParse .).host }}
{{- $port := regexFind ":[0-9]+$" $host | trimPrefix ":" }}
{{- if not $port }}{{ $port = ternary "443" "80" (hasPrefix "https:" .) }}{{ end }}
{{- $ports = append $ports $port }}
{{- end }}
{{- range uniq $ports }}
    - {protocol: TCP, port: {{ . }}}
{{- end }}
{{- else if .Values.registry.enabled }}
- to:
    - podSelector:
        matchLabels:
          {{- include "helios.selector" (list . "registry") | nindent 10 }}
  ports:
    - {protocol: TCP, port: {{ .Values.registry.port }}}
{{- end }}
{{- end }}
{{- /* The API server's address is not known: its usual ports, anywhere. */}}
{{- define "helios.apiServer" -}}
- ports:
    - {protocol: TCP, port: 443}
    - {protocol: TCP, port: 6443}
{{- end }}
