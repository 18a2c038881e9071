# One image for every part of the pipeline:
#
#   docker build -t fiq:local .
#   docker run --rm fiq:local fiq version              the command line
#   docker run … fiq:local python -m services.ingest   a service
#
# Builds with BuildKit and with the classic builder. docs/deploy.md has the build arguments.

# Debian based, or anything with /bin/sh, tar and CPython >= 3.11 as python3 on the PATH
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# where packages come from, if not from the default index; nothing of it gets into the result. Files that pip needs for
# it (a certificate bundle, wheels) may lie in the git-ignored folder .docker-build/ and are then in /build.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
WORKDIR /build
COPY requirements/image.txt requirements/build.txt .docker-buil[d] ./
RUN set -eu; \
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1; \
    python3 -m venv tools; \
    python3 -m venv --without-pip /opt/fiq; \
    tools/bin/pip --python /opt/fiq install -q --require-hashes -r build.txt; \
    tools/bin/pip --python /opt/fiq install -q --no-build-isolation --require-hashes -r image.txt; \
    find /opt/fiq -type d \( -name tests -o -name include \) -path '*/site-packages/*' -prune -exec rm -rf {} +; \
    find /opt/fiq -name '*.pyi' -delete
COPY pyproject.toml README.md ./
COPY fiq fiq
COPY services services
COPY deploy/nats-cluster/nats.conf deploy/nats-cluster/nats.conf
RUN set -eu; \
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INDEX=1; \
    tools/bin/pip --python /opt/fiq install -q --no-deps --no-build-isolation .; \
    tools/bin/pip --python /opt/fiq uninstall -q -y -r build.txt; \
    tools/bin/pip --python /opt/fiq check -q

FROM ${PYTHON_IMAGE}
# the user is a number that is the same everywhere, so that the owner of a volume is too; pip came with the base; its
# library came without byte code, which nobody could write later: each health check would compile what it imports anew
RUN set -eu; \
    echo 'fiq:x:10001:10001:fiq:/nonexistent:/usr/sbin/nologin' >> /etc/passwd; \
    echo 'fiq:x:10001:' >> /etc/group; \
    find / -xdev -type d \( -name ensurepip -o -name pip -o -name 'pip-*.dist-info' -o -name setuptools \
      -o -name 'setuptools-*.dist-info' -o -name wheel -o -name 'wheel-*.dist-info' -o -name python-wheels \) \
      \( -path '*/lib/python3*' -o -path '/usr/share/python-wheels' \) -prune -exec rm -rf {} +; \
    rm -f /usr/local/bin/pip* /usr/local/bin/wheel; \
    python3 -m compileall -q -x '/(test|tests|idlelib|lib2to3|turtledemo|tkinter|distutils)/' \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"; \
    mkdir -m 0700 /data; \
    chown 10001:10001 /data
ENV PATH=/opt/fiq/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FI_HOST=0.0.0.0 \
    FI_MANAGEMENT_HOST=0.0.0.0 \
    FI_PERSISTER_HOST=0.0.0.0 \
    FI_DATA_DIR=/data
USER 10001:10001
WORKDIR /data
EXPOSE 7001 7002 7101
# healthy is what has an event loop that turns, ingest or persister; compose asks each service what it should be asked
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python3", "-m", "services.core.probe", "http://127.0.0.1:7101/healthz", "http://127.0.0.1:7002/healthz"]
CMD ["fiq", "--help"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fiq" \
      org.opencontainers.image.description="Event pipeline: HTTP to a three-node JetStream log to per-consultation HDF5" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# last: with the classic builder each instruction behind a change costs a second
COPY --from=build /opt/fiq /opt/fiq
