# The daemon and the gateway with the dependencies of the lock. Needs BuildKit, which every current engine has.
#
#   docker build -t generation-consumer:0.1.0 .
#   docker run --gpus all --read-only --tmpfs /tmp --volume models:/home/generation/models --stop-timeout 45 \
#     -e MODEL_TYPE=text_to_image -e NATS_URL=… -e S3_ENDPOINT=… generation-consumer:0.1.0
#
# The root file system may be read-only. Two places only are written to: /home/generation/models, the
# cache of downloaded models, a volume; and /tmp, a tmpfs.
#
# TORCH=cuda, the default, installs the locked build of torch: on Linux this build includes CUDA, and
# works on a machine without a GPU as well. torch does not import without the CUDA libraries, so
# TORCH=cpu takes the same versions of torch and torchvision from another index,
# whose address is TORCH_INDEX. Those two wheels are then pinned by version only, all others by the
# hashes of the lock. EXTRAS are options of `uv sync`, such as "--extra=gateway --extra=quantization".
#
# The image has no compiler: MODEL_COMPILE needs one, and a /tmp from which programs may run.
ARG PYTHON=3.11-slim-bookworm
ARG TORCH=cuda

FROM python:${PYTHON} AS tools
RUN apt-get update \
    && apt-get install --yes --no-install-recommends "tini=0.19.0-*" \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv==0.13.8
# Compiled byte code: a start without it takes three times as long, and the file system is read-only later.
ENV UV_CACHE_DIR=/var/cache/uv \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PROJECT_ENVIRONMENT=/opt/venv \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /src
# The dependencies need only these files: their layer, of gigabytes, changes only with the lock.
COPY pyproject.toml uv.lock ./
COPY contracts/pyproject.toml contracts/

FROM tools AS dependencies-cuda
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG EXTRAS="--extra=gateway --extra=traces"
RUN --mount=type=cache,target=/var/cache/uv \
    echo "${EXTRAS}" | xargs uv sync --locked --no-dev --no-install-workspace

FROM tools AS dependencies-cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG EXTRAS="--extra=gateway --extra=traces"
ARG TORCH_INDEX
RUN --mount=type=cache,target=/var/cache/uv \
    : "${TORCH_INDEX:?the address of an index with wheels of torch for CPUs}" \
    && { echo "${EXTRAS}"; \
         sed -nE 's/^name = "(torch|torchvision|triton|(nvidia|cuda)-.+)"$/--no-install-package=\1/p' uv.lock; } \
       | xargs uv sync --locked --no-dev --no-install-workspace \
    && sed -nE '/^name = "(torch|torchvision)"$/{N;s/name = "(.+)"\nversion = "(.+)"/\1==\2/p}' uv.lock \
       | xargs uv pip install --python /opt/venv/bin/python --no-deps --default-index "${TORCH_INDEX}"

# hadolint ignore=DL3006 # one of the two stages above, not an image of a registry
FROM dependencies-${TORCH} AS dependencies

FROM tools AS project
COPY contracts contracts
COPY consumer consumer
COPY infra/nats infra/nats
COPY README.md ./
RUN --mount=type=cache,target=/var/cache/uv \
    uv build --all-packages --wheel --out-dir /wheels

FROM python:${PYTHON}
# A number, so that a policy against root can check it; its home is the tmpfs.
RUN groupadd --gid 10001 generation \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp \
       --shell /usr/sbin/nologin generation \
    && install --directory --owner=10001 --group=10001 /home/generation/models
COPY --from=tools /usr/bin/tini /usr/bin/tini
COPY --from=dependencies /opt/venv /opt/venv
# Two small wheels on top, so that a change of the code makes no new layer of gigabytes. pip is not needed
# after that.
RUN --mount=type=bind,from=project,source=/wheels,target=/wheels \
    pip --python /opt/venv/bin/python install --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && pip uninstall --yes --root-user-action=ignore setuptools wheel pip
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/home/generation/models \
    CONSUMER_PROBES_HOST=0.0.0.0 \
    CONSUMER_PROBES_PORT=8080
USER 10001:10001
VOLUME /home/generation/models
EXPOSE 8080
# On SIGTERM the daemon finishes its requests within CONSUMER_DRAIN_GRACE, 30 s by default, and closes its
# connections. The engine must wait about 15 s longer than that, 45 s, before it kills. With the default
# of 10 s every running request would run again.
STOPSIGNAL SIGTERM
# The first minutes may be a download. /livez and not /readyz, because an unreachable store is no reason to
# restart the daemon. Six minutes without an answer, more than CONSUMER_STALL_TIMEOUT, because the lease
# guard ends a daemon whose model blocks the interpreter lock.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --start-interval=2s --retries=24 \
    CMD ["python", "-ISc", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/livez', timeout=4)"]
# tini: the daemon must not be process 1, because no process in the container can kill process 1, not even
# the lease guard that ends a daemon whose threads hang.
ENTRYPOINT ["/usr/bin/tini", "--", "consumer"]
CMD ["run"]
ARG VERSION=0.1.0
ARG REVISION
LABEL org.opencontainers.image.title="generation-consumer" \
      org.opencontainers.image.description="A message-driven generation daemon: requests from NATS JetStream, outputs to S3, result events back" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
