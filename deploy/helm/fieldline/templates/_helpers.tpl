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

{{/* Where a node finds the files by which nodes know each other. */}}
{{- define "fieldline.nodeFiles" -}}
{{- with .Values.nodeCertificates }}
{{- if and .authoritySecret .volume }}{{ fail "nodeCertificates has both authoritySecret and volume: leave one of them out" }}{{ end }}
{{- if .authoritySecret -}}
ca: /run/fieldline/ca.pem
certificate: /run/fieldline/node.pem
key: /run/fieldline/node.key
{{- else if .volume -}}
ca: /etc/fieldline-node/{{ .files.ca }}
certificate: /etc/fieldline-node/{{ .files.certificate }}
key: /etc/fieldline-node/{{ .files.key }}
{{- else }}{{ fail "nodeCertificates.authoritySecret is missing: nodes know each other by certificates. Make an authority with `fieldline certificates new-ca` and a Secret of it with `kubectl create secret generic fieldline-authority --from-file=certificates/ca.pem --from-file=certificates/ca.key`, and name it" }}{{ end }}
{{- end }}
{{- end }}

{{/* The port of object storage. */}}
{{- define "fieldline.blobsPort" -}}
{{- $at := urlParse (default "https://aws" .Values.blobs.endpoint) }}
{{- default (ternary "80" "443" (eq $at.scheme "http")) (regexFind ":[0-9]+$" $at.host | trimPrefix ":") }}
{{- end }}

{{/* The configuration file, but for what each pod adds to [node]: files/prepare.sh. */}}
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
{{- with .Values.blobs }}
{{- if .url }}

[blobs]
url = {{ .url | toJson }}
{{- if .endpoint }}
endpoint = {{ .endpoint | toJson }}
{{- end }}
region = {{ .region | toJson }}
{{- if .caSecret }}
tls_ca = "/etc/fieldline-blobs/ca.crt"
{{- end }}
{{- end }}
{{- end }}

{{ .Values.config }}
{{- end }}
