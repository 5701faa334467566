# Before its node starts, each pod runs this: it gets a certificate in its own name, and the configuration is completed by what
# only the pod knows. Needs FIELDLINE_NODE, POD_IP and ZONE (may be empty); CA, CERTIFICATE and KEY, where the node finds these files;
# ISSUE_DAYS, empty where others issue.
set -eu
umask 077
cd /run/fieldline

if [ -n "$ISSUE_DAYS" ]; then
  cp -f /authority/ca.pem ca.pem
  # A link, so that the authority's key itself is nowhere but in the volume that this container alone has.
  ln -sf /authority/ca.key ca.key
  fieldline certificates issue --folder . --name "$FIELDLINE_NODE" --days "$ISSUE_DAYS" > /dev/null
  rm ca.key
  mv "$FIELDLINE_NODE.pem" node.pem
  mv "$FIELDLINE_NODE.key" node.key
fi

section='^[[:space:]]*\[[[:space:]]*node[[:space:]]*\]'
if ! grep -q "$section" /etc/fieldline/fieldline.toml; then
  echo "fieldline.toml of the Secret has no line [node]: add it, with etcd = [...]" >&2
  exit 1
fi
# The pod's own address: its name leads nowhere, and others are told where it listens.
case $POD_IP in
  *:*) listen="[$POD_IP]:7080" ;;
  *) listen="$POD_IP:7080" ;;
esac
{
  printf 'listen = "%s"\nca = "%s"\ncertificate = "%s"\nkey = "%s"\n' "$listen" "$CA" "$CERTIFICATE" "$KEY"
  if [ -n "$ZONE" ]; then printf 'zone = "%s"\n' "$ZONE"; fi
} > of-the-pod
sed "/$section/r of-the-pod" /etc/fieldline/fieldline.toml > fieldline.toml
rm of-the-pod
