# syntax=docker/dockerfile:1
# vLLM with `helios worker` (docs/worker.md) for GPUs: vLLM's own image, and Helios beside it.
#
#   docker buildx build --build-arg SOURCE_DATE_EPOCH="$(git log -1 --format=%ct)" --file node-daemonset/images/vllm.Dockerfile .
#
# The models are not in it: they come as volumes.

ARG PYTHON=python:3.11.14-slim-bookworm
ARG VLLM=vllm/vllm-openai:v0.32.0

FROM ${PYTHON} AS build
ARG SOURCE_DATE_EPOCH=0
ENV SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY scripts/proto_stubs.py scripts/proto_stubs.py
COPY helios helios
COPY heliosfs heliosfs
COPY registry registry
COPY router router
COPY csi csi
COPY orchestrator orchestrator
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM ${VLLM} AS vllm
ARG SOURCE_DATE_EPOCH=0
ENV SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# vLLM's versions stay as they are: its own installation is the constraint. The bill of materials is of all of it.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip freeze --exclude-editable | grep -v ' @ ' > /tmp/constraints.txt \
 && python3 -m pip install --no-cache-dir --no-compile --constraint /tmp/constraints.txt \
      "helios-llm[client] @ file://$(echo /wheels/helios_llm-*.whl)" \
 && python3 -m venv /tmp/sbom && /tmp/sbom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
 && mkdir -p /usr/share/sbom \
 && /tmp/sbom/bin/cyclonedx-py environment --output-reproducible --of JSON -o /usr/share/sbom/vllm.cdx.json "$(command -v python3)" \
 && rm -rf /tmp/sbom /tmp/constraints.txt
USER 10001:10001
ENTRYPOINT []
CMD ["helios", "worker", "--help"]
