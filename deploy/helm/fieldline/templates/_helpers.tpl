{{/* Name of the release's objects. */}}
{{- define "fieldline.name" -}}
{{- if contains "fieldline" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-fieldline" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* What finds the pods. */}}
{{- define "fieldline.selector" -}}
app.kubernetes.io/name: fieldline
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "fieldline.labels" -}}
{{ include "fieldline.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "fieldline.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "fieldline.name" .) .Values.serviceAccount.name }}{{ else }}{{ default "default" .Values.serviceAccount.name }}{{ end }}
{{- end }}

{{- define "fieldline.secret" -}}
{{- default (include "fieldline.name" .) .Values.existingSecret }}
{{- end }}

{{/* The configuration file. */}}
{{- define "fieldline.toml" -}}
[node]
etcd = {{ .Values.servers.etcd | toJson }}

[postgres]
url = {{ required "servers.postgres is missing: the URL of the database, or name an existingSecret" .Values.servers.postgres | toJson }}

[redis]
url = {{ required "servers.redis is missing: the URL of Redis, or name an existingSecret" .Values.servers.redis | toJson }}

[mqtt_bus]
url = {{ required "servers.bus is missing: the URL of the MQTT broker, or name an existingSecret" .Values.servers.bus | toJson }}

[http]
listen = "0.0.0.0:8080"

[mqtt]
listen = "0.0.0.0:1883"
{{- if .Values.mqttTlsSecret }}
listen_tls = "0.0.0.0:8883"
tls_certificate = "/etc/fieldline-mqtt/tls.crt"
tls_key = "/etc/fieldline-mqtt/tls.key"
{{- end }}
{{- with .Values.balancers }}

[balancers]
addresses = {{ . | toJson }}
{{- end }}

{{ .Values.config }}
{{- end }}
