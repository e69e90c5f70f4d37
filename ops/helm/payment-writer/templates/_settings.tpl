{{/* The settings: what the chart derives from other values, overridden by `settings`. As JSON. */}}
{{- define "payment-writer.settings" -}}
{{- $kafka := dict -}}
{{- $properties := dict -}}
{{- $sasl := .Values.kafka.sasl -}}
{{- $tls := .Values.kafka.tls -}}
{{- if $tls.enabled -}}
{{- $_ := set $properties "security.protocol" (ternary "SASL_SSL" "SSL" (ne $sasl.existingSecret "")) -}}
{{- if $tls.existingSecret -}}
{{- $_ := set $properties "ssl.ca.location" (printf "/tls/kafka/%s" $tls.caKey) -}}
{{- if $tls.certKey -}}
{{- $_ := set $properties "ssl.certificate.location" (printf "/tls/kafka/%s" $tls.certKey) -}}
{{- $_ := set $properties "ssl.key.location" (printf "/tls/kafka/%s" $tls.keyKey) -}}
{{- end -}}
{{- end -}}
{{- else if $sasl.existingSecret -}}
{{- $_ := set $properties "security.protocol" "SASL_PLAINTEXT" -}}
{{- end -}}
{{- if $sasl.existingSecret -}}
{{- $_ := set $properties "sasl.mechanism" $sasl.mechanism -}}
{{- $_ := set $kafka "password_file" (printf "/secrets/kafka/%s" $sasl.passwordKey) -}}
{{- end -}}
{{- if $properties -}}
{{- $_ := set $kafka "properties" $properties -}}
{{- end -}}
{{- $admin := dict -}}
{{- if .Values.admin.token.existingSecret -}}
{{- $_ := set $admin "token_file" (printf "/secrets/admin/%s" .Values.admin.token.key) -}}
{{- end -}}
{{- if .Values.admin.metricsPort -}}
{{- $_ := set $admin "metrics_listen" (printf "%s:%d" .Values.admin.address (int64 .Values.admin.metricsPort)) -}}
{{- end -}}
{{- /* The headless Service's name stands for all instances. */ -}}
{{- $console := dict "peers" (list (printf "%s:9464" (include "payment-writer.fullname" .))) -}}
{{- mergeOverwrite (dict "kafka" $kafka "admin" $admin "console" $console) (deepCopy .Values.settings) | toJson -}}
{{- end }}

{{/* The value of one setting, or its default: list of context, section, key, default. */}}
{{- define "payment-writer.setting" -}}
{{- $section := get (index . 0).Values.settings (index . 1) | default dict -}}
{{- get $section (index . 2) | default (index . 3) -}}
{{- end }}

{{/* A value as TOML. Helm's own toToml writes whole numbers as 2.0. */}}
{{- define "payment-writer.tomlValue" -}}
{{- if kindIs "slice" . -}}
{{- $items := list -}}
{{- range . -}}{{- $items = append $items (include "payment-writer.tomlValue" .) -}}{{- end -}}
[{{ join ", " $items }}]
{{- else if kindIs "string" . -}}
{{- toRawJson . -}}
{{- else if or (kindIs "bool" .) (ne (floor .) (float64 .)) -}}
{{- toJson . -}}
{{- else -}}
{{- int64 . -}}
{{- end -}}
{{- end }}

{{- define "payment-writer.tomlKey" -}}
{{- ternary . (quote .) (regexMatch "^[A-Za-z0-9_-]+$" .) -}}
{{- end }}

{{/* A table as TOML: list of its path and its contents. Values first, then tables. Null stands for absent. */}}
{{- define "payment-writer.toml" -}}
{{- $path := index . 0 -}}
{{- $table := index . 1 -}}
{{- $values := list -}}
{{- $tables := list -}}
{{- range $key, $value := $table -}}
{{- if kindIs "map" $value -}}
{{- $name := include "payment-writer.tomlKey" $key -}}
{{- $tables = append $tables (include "payment-writer.toml" (list (ternary (printf "%s.%s" $path $name) $name (ne $path "")) $value)) -}}
{{- else if not (kindIs "invalid" $value) -}}
{{- $values = append $values (printf "%s = %s\n" (include "payment-writer.tomlKey" $key) (include "payment-writer.tomlValue" $value)) -}}
{{- end -}}
{{- end -}}
{{- if and $path $values -}}
{{- printf "\n[%s]\n" $path -}}
{{- end -}}
{{- join "" $values -}}
{{- join "" $tables -}}
{{- end }}

{{- define "payment-writer.file" -}}
# Made by the Helm chart from its value `settings`.
{{ include "payment-writer.toml" (list "" (include "payment-writer.settings" . | fromJson)) | trim }}
{{- end }}

{{/* Seconds until a pod is killed: longer than a drain may take. */}}
{{- define "payment-writer.gracePeriod" -}}
{{- $timeout := include "payment-writer.setting" (list . "shutdown" "timeout" "30s") -}}
{{- $drain := include "payment-writer.seconds" $timeout | int64 -}}
{{- $given := int64 .Values.terminationGracePeriodSeconds -}}
{{- if and $given (le $given $drain) -}}
{{- fail (printf "terminationGracePeriodSeconds (%d) must be longer than settings.shutdown.timeout (%s)" $given $timeout) -}}
{{- end -}}
{{- $given | default (add $drain 15) -}}
{{- end }}

{{/* What the schema of the values cannot say. */}}
{{- define "payment-writer.validate" -}}
{{- $partitions := int64 .Values.topics.partitions -}}
{{- $auto := .Values.autoscaling -}}
{{- $most := ternary "autoscaling.maxReplicas" "replicas" $auto.enabled -}}
{{- $instances := ternary $auto.maxReplicas .Values.replicas $auto.enabled | int64 -}}
{{- if gt $instances $partitions -}}
{{- fail (printf "%s (%d) must be at most topics.partitions (%d): more instances would be idle" $most $instances $partitions) -}}
{{- end -}}
{{- if and $auto.enabled (gt (int64 $auto.minReplicas) (int64 $auto.maxReplicas)) -}}
{{- fail "autoscaling.minReplicas must be at most autoscaling.maxReplicas" -}}
{{- end -}}
{{- if dig "kafka" "instance_id" "" .Values.settings -}}
{{- fail "settings.kafka.instance_id cannot be set: each pod's name is its instance_id" -}}
{{- end -}}
{{- if dig "admin" "listen" "" .Values.settings -}}
{{- fail "settings.admin.listen cannot be set: use admin.address; the port is 9464" -}}
{{- end -}}
{{- $url := include "payment-writer.setting" (list . "postgres" "url" "") -}}
{{- if and (not .Values.postgres.existingSecret) (not $url) -}}
{{- fail "postgres.existingSecret or settings.postgres.url is needed" -}}
{{- end -}}
{{- if and .Values.postgres.existingSecret $url -}}
{{- fail "settings.postgres.url has no effect beside postgres.existingSecret: set postgres.existingSecret to \"\"" -}}
{{- end -}}
{{- range $key := list "url" "housekeeping_url" -}}
{{- if regexMatch "://[^/@]*:[^/@]*@|[?&]password=" (include "payment-writer.setting" (list $ "postgres" $key "")) -}}
{{- fail (printf "settings.postgres.%s has a password: the settings are in a ConfigMap. Use postgres.existingSecret" $key) -}}
{{- end -}}
{{- end -}}
{{- $settings := include "payment-writer.settings" . | fromJson -}}
{{- $properties := dig "kafka" "properties" dict $settings | toJson -}}
{{- if regexMatch "\"(sasl\\.|ssl\\.key\\.|ssl\\.keystore\\.)?password\"|\"ssl\\.key\\.pem\"|client\\.secret" $properties -}}
{{- fail "settings.kafka.properties has a secret: the settings are in a ConfigMap. Use kafka.sasl.existingSecret or extraEnv" -}}
{{- end -}}
{{- end }}
