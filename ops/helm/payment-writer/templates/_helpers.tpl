{{/* At most 52 characters: the name of a StatefulSet and a hash become a label, which has at most 63. */}}
{{- define "payment-writer.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "payment-writer.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "payment-writer.labels" -}}
{{ include "payment-writer.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "payment-writer.serviceAccount" -}}
{{- default (ternary (include "payment-writer.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end }}

{{/* Objects that a hook before the installation refers to are hooks of a lower weight, with names of their own, as
     the release's objects are not there yet. Nothing of them is left after the hooks. */}}
{{- define "payment-writer.hooks" -}}
{{ or .Values.migrate.enabled .Values.topics.create | ternary "true" "" }}
{{- end }}

{{- define "payment-writer.hookAnnotations" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{- define "payment-writer.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end }}

{{/* Seconds of a duration with one unit. */}}
{{- define "payment-writer.seconds" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- if eq $unit "ms" -}}
{{- divf $number 1000 | ceil | int64 -}}
{{- else -}}
{{- get (dict "s" 1 "m" 60 "h" 3600 "d" 86400) $unit | mul $number -}}
{{- end -}}
{{- end }}

{{/* Seconds in the largest unit of Prometheus that gives a whole number, as ops/prometheus/render does. */}}
{{- define "payment-writer.duration" -}}
{{- $seconds := int64 . -}}
{{- if not (mod $seconds 86400) -}}{{ div $seconds 86400 }}d
{{- else if not (mod $seconds 3600) -}}{{ div $seconds 3600 }}h
{{- else if not (mod $seconds 60) -}}{{ div $seconds 60 }}m
{{- else -}}{{ $seconds }}s
{{- end -}}
{{- end }}
