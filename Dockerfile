# syntax=docker/dockerfile:1
# Two images from one distribution: `docker build --target operator .` and `docker build --target trainer .`.
# Both run as a numeric non-root user on a read-only root file system, under Pod Security `restricted`.

FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH

FROM base AS build
RUN pip install --no-cache-dir "uv>=0.9"
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_CACHE_DIR=/var/cache/uv
WORKDIR /src
RUN uv venv /opt/venv
COPY pyproject.toml README.md LICENSE ./

# Dependencies change less often than code and, for the trainer, weigh gigabytes: a layer of their own.
FROM build AS operator-build
RUN --mount=type=cache,target=/var/cache/uv uv pip install --python /opt/venv/bin/python -r pyproject.toml --extra operator
COPY crds crds
COPY operator operator
COPY trainer trainer
RUN uv pip install --python /opt/venv/bin/python --no-deps .

FROM build AS trainer-build
RUN --mount=type=cache,target=/var/cache/uv uv pip install --python /opt/venv/bin/python -r pyproject.toml --extra trainer --extra optimizers --extra metrics --extra cuda
# CLIP's vocabulary for checkpoints in one file; the list alone is read, so the package's own requirements stay out.
RUN --mount=type=cache,target=/var/cache/uv uv pip install --python /opt/venv/bin/python --no-deps "open-clip-torch>=3.2"
COPY crds crds
COPY operator operator
COPY trainer trainer
RUN uv pip install --python /opt/venv/bin/python --no-deps .

FROM base AS operator
COPY --from=operator-build /opt/venv /opt/venv
USER 65532:65532
ENTRYPOINT ["python", "-m", "diffusion_operator"]

FROM base AS trainer
# Triton compiles its launchers with the system's C compiler when it first meets a kernel.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=trainer-build /opt/venv /opt/venv
# The supervisor is PID 1: it forwards SIGTERM and keeps true exit codes, which a shell or `accelerate launch` loses.
USER 10001:10001
ENTRYPOINT ["python", "-m", "diffusion_trainer"]
