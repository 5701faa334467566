#!/bin/sh
# Makes a Debian package from a built program: sh deploy/deb/build.sh PROGRAM OUTPUT-FOLDER
# PROGRAM is usually target/release/fieldline. Needs dpkg-deb and dpkg-shlibdeps (Debian packages dpkg and dpkg-dev).
# The package has the program, two units, a user, and configuration; it starts nothing by itself.
set -eu
program=$1
output=$2
deploy=$(cd "$(dirname "$0")/.." && pwd)
version=$("$program" --version | cut -d' ' -f2)
architecture=$(dpkg --print-architecture)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root="$work/fieldline"

put() { install -D -m "$1" "$2" "$root/$3"; }
put 755 "$program" usr/bin/fieldline
strip --strip-unneeded "$root/usr/bin/fieldline"
for unit in fieldline.service fieldline-node@.service; do put 644 "$deploy/systemd/$unit" "lib/systemd/system/$unit"; done
put 644 "$deploy/systemd/fieldline.sysusers" usr/lib/sysusers.d/fieldline.conf
put 644 "$deploy/systemd/fieldline.tmpfiles" usr/lib/tmpfiles.d/fieldline.conf
put 644 "$deploy/config/fieldline.toml" etc/fieldline/fieldline.toml
share=usr/share/doc/fieldline
put 644 "$deploy/config/node.toml.example" $share/examples/node.toml
for file in balancer.env fill.sh nginx/nginx.conf.template haproxy/haproxy.cfg.template \
    keepalived/keepalived.conf.template keepalived/check.sh; do
    put 644 "$deploy/$file" "$share/examples/$file"
done
put 644 "$deploy/deb/copyright" $share/copyright
date=$(git -C "$deploy" log -1 --format=%cD 2>/dev/null || date -R)
printf 'fieldline (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md of this version.\n\n -- Fieldline maintainers <maintainers@fieldline.invalid>  %s\n' \
    "$version" "$date" > "$work/changelog"
mkdir -p "$root/usr/share/man/man1"
sed "s/@VERSION@/$version/" "$deploy/deb/fieldline.1" | gzip -9n > "$root/usr/share/man/man1/fieldline.1.gz"
gzip -9n < "$work/changelog" > "$root/$share/changelog.gz"
chmod 644 "$root/usr/share/man/man1/fieldline.1.gz" "$root/$share/changelog.gz"
find "$root" -type d -exec chmod 755 {} +

mkdir -p "$work/debian" "$root/DEBIAN"
printf 'Source: fieldline\nPackage: fieldline\nArchitecture: any\n' > "$work/debian/control"
needs=$(cd "$work" && dpkg-shlibdeps -O -efieldline/usr/bin/fieldline | sed -n 's/^shlibs:Depends=//p')
size=$(du -sk --apparent-size "$root" | cut -f1)
sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@SIZE@/$size/" -e "s/@NEEDS@/$needs/" \
    "$deploy/deb/control" > "$root/DEBIAN/control"
echo /etc/fieldline/fieldline.toml > "$root/DEBIAN/conffiles"
for script in postinst prerm postrm; do install -m 755 "$deploy/deb/$script" "$root/DEBIAN/$script"; done
(cd "$root" && find usr lib -type f -exec md5sum {} + > DEBIAN/md5sums)
chmod 644 "$root/DEBIAN/control" "$root/DEBIAN/conffiles" "$root/DEBIAN/md5sums"
mkdir -p "$output"
dpkg-deb --root-owner-group -Zxz --build "$root" "$output/fieldline_${version}_$architecture.deb"
