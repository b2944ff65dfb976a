# The daemon with the locked dependencies (CUDA comes with the torch wheels of the lock).
#   docker build -t generation-consumer .
#   docker run --gpus all -e MODEL_TYPE=text_to_image -e NATS_URL=… -e S3_ENDPOINT=… generation-consumer
FROM python:3.12-slim-bookworm AS build
RUN pip install --no-cache-dir uv==0.13.8
ENV UV_CACHE_DIR=/var/cache/uv UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PROJECT_ENVIRONMENT=/opt/venv
WORKDIR /src
# The dependencies first: this layer changes only with the lock.
COPY pyproject.toml uv.lock ./
COPY contracts/pyproject.toml contracts/
RUN --mount=type=cache,target=/var/cache/uv \
    uv sync --locked --no-dev --no-install-workspace
COPY contracts contracts
COPY consumer consumer
COPY infra/nats infra/nats
COPY README.md ./
RUN --mount=type=cache,target=/var/cache/uv \
    uv sync --locked --no-dev --no-editable

FROM python:3.12-slim-bookworm
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home --uid 10001 generation
USER generation
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/home/generation/models \
    CONSUMER_PROBES_HOST=0.0.0.0 \
    CONSUMER_PROBES_PORT=8080
VOLUME /home/generation/models
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=3s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/livez', timeout=2)"]
ENTRYPOINT ["consumer"]
CMD ["run"]
