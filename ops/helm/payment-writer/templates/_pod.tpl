{{/* Environment, mounts and volumes are the same for the daemon and for each command, as a command reads the same
     settings and checks the files that they name. */}}
{{- define "payment-writer.env" -}}
- name: PAYMENT_WRITER_CONFIG
  value: /etc/payment-writer/payment-writer.toml
# The image sets it, too, and the environment takes precedence over the file.
- name: PAYMENT_WRITER__ADMIN__LISTEN
  value: {{ printf "%s:9464" .Values.admin.address | quote }}
{{- with .Values.postgres }}
{{- if .existingSecret }}
- name: PAYMENT_WRITER__POSTGRES__URL
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret }}, key: {{ .urlKey }}}
{{- if .housekeepingUrlKey }}
- name: PAYMENT_WRITER__POSTGRES__HOUSEKEEPING_URL
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret }}, key: {{ .housekeepingUrlKey }}}
{{- end }}
{{- if .passfileKey }}
- name: PGPASSFILE
  value: /secrets/postgres/{{ .passfileKey }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.kafka.sasl }}
{{- if .existingSecret }}
- name: PAYMENT_WRITER__KAFKA__PROPERTIES__SASL_USERNAME
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret }}, key: {{ .usernameKey }}}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "payment-writer.mounts" -}}
- {name: settings, mountPath: /etc/payment-writer, readOnly: true}
# For token and password commands that write files.
- {name: tmp, mountPath: /tmp}
{{- range $mount := include "payment-writer.secretVolumes" . | fromJsonArray }}
- {name: {{ $mount.name }}, mountPath: {{ $mount.path }}, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Secrets that are mounted: name of the volume, path, Secret, and the keys that are mounted (all, if empty). */}}
{{- define "payment-writer.secretVolumes" -}}
{{- $found := list -}}
{{- with .Values.kafka.sasl -}}{{- if .existingSecret -}}
{{- $found = append $found (dict "name" "kafka-password" "path" "/secrets/kafka" "secret" .existingSecret "keys" (list .passwordKey)) -}}
{{- end -}}{{- end -}}
{{- with .Values.kafka.tls -}}{{- if and .enabled .existingSecret -}}
{{- $keys := list .caKey -}}
{{- if .certKey -}}{{- $keys = append (append $keys .certKey) .keyKey -}}{{- end -}}
{{- $found = append $found (dict "name" "kafka-tls" "path" "/tls/kafka" "secret" .existingSecret "keys" $keys) -}}
{{- end -}}{{- end -}}
{{- with .Values.postgres -}}{{- if and .existingSecret .passfileKey -}}
{{- $found = append $found (dict "name" "postgres-password" "path" "/secrets/postgres" "secret" .existingSecret "keys" (list .passfileKey)) -}}
{{- end -}}{{- if .tls.existingSecret -}}
{{- $found = append $found (dict "name" "postgres-tls" "path" "/tls/postgres" "secret" .tls.existingSecret "keys" list) -}}
{{- end -}}{{- end -}}
{{- with .Values.admin.token -}}{{- if .existingSecret -}}
{{- $found = append $found (dict "name" "admin-token" "path" "/secrets/admin" "secret" .existingSecret "keys" (list .key)) -}}
{{- end -}}{{- end -}}
{{- toJson $found -}}
{{- end }}

{{/* List of context and the ConfigMap's name. */}}
{{- define "payment-writer.volumes" -}}
{{- $context := index . 0 -}}
- name: settings
  configMap: {name: {{ index . 1 }}}
- name: tmp
  emptyDir: {sizeLimit: 64Mi}
{{- range $volume := include "payment-writer.secretVolumes" $context | fromJsonArray }}
- name: {{ $volume.name }}
  secret:
    secretName: {{ $volume.secret }}
    # Readable for the group, which is fsGroup.
    defaultMode: 0440
    {{- with $volume.keys }}
    items:
      {{- range . }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
    {{- end }}
{{- end }}
{{- with $context.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What every pod has: list of context and the service account's name. */}}
{{- define "payment-writer.pod" -}}
{{- $context := index . 0 -}}
serviceAccountName: {{ index . 1 }}
automountServiceAccountToken: false
# Nothing reads the variables of other services.
enableServiceLinks: false
securityContext:
  {{- toYaml $context.Values.podSecurityContext | nindent 2 }}
{{- with $context.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $context.Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $context.Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $context.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* Template of a pod that runs one command: dict of context, component, args, and whether it is a hook. */}}
{{- define "payment-writer.command" -}}
{{- $context := .context -}}
{{- $suffix := ternary "-hooks" "" .hook -}}
metadata:
  labels:
    {{- include "payment-writer.selector" $context | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with $context.Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $context.Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- $account := include "payment-writer.serviceAccount" $context }}
  {{- if and .hook $context.Values.serviceAccount.create }}
  {{- $account = printf "%s-hooks" $account }}
  {{- end }}
  {{- include "payment-writer.pod" (list $context $account) | nindent 2 }}
  restartPolicy: Never
  containers:
    - name: {{ .component }}
      image: {{ include "payment-writer.image" $context | quote }}
      imagePullPolicy: {{ $context.Values.image.pullPolicy }}
      args: {{ toJson .args }}
      env:
        {{- include "payment-writer.env" $context | nindent 8 }}
      resources:
        {{- toYaml $context.Values.jobs.resources | nindent 8 }}
      securityContext:
        {{- toYaml $context.Values.securityContext | nindent 8 }}
      volumeMounts:
        {{- include "payment-writer.mounts" $context | nindent 8 }}
  volumes:
    {{- include "payment-writer.volumes" (list $context (printf "%s%s" (include "payment-writer.fullname" $context) $suffix)) | nindent 4 }}
{{- end }}

{{/* Spec of a Job, with the same dict. */}}
{{- define "payment-writer.job" -}}
backoffLimit: {{ .context.Values.jobs.backoffLimit }}
activeDeadlineSeconds: {{ .context.Values.jobs.activeDeadlineSeconds }}
# Wrong settings, or a person must decide: trying again does not help.
podFailurePolicy:
  rules:
    - {action: FailJob, onExitCodes: {operator: In, values: [2, 3]}}
template:
  {{- include "payment-writer.command" . | nindent 2 }}
{{- end }}
