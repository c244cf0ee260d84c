# Two images of one file:
#
#     docker build --target cpu --tag editr2:cpu .
#     docker build --target cuda --tag editr2:cuda .
#
#     docker run --rm --user "$(id -u)" -v "$PWD:/data" editr2:cpu quickstart
#     docker run --rm --user "$(id -u)" --gpus all --shm-size 8g -v "$PWD:/data" editr2:cuda \
#         train --config my.yaml
#
# Versions are those of constraints.txt. TORCH_INDEX is pip's index of the builds of torch that are
# wanted; without it torch comes from the same index as everything else, with its CUDA libraries.
# CUDA_TAG chooses the toolkit that compiles the CUDA operators; torch brings its own runtime.
ARG PYTHON_TAG=3.12-slim-bookworm
ARG CUDA_TAG=12.8.1-devel-ubuntu24.04

FROM python:${PYTHON_TAG} AS cpu-build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/editr2
WORKDIR /src
ARG TORCH_INDEX=
COPY constraints.txt ./
RUN /opt/editr2/bin/pip install --no-cache-dir --constraint constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY . .
ENV EDITR2_BUILD_CUDA=0
RUN /opt/editr2/bin/pip install --no-cache-dir --constraint constraints.txt '.[judges,label,tensorboard]'

FROM python:${PYTHON_TAG} AS cpu
COPY --from=cpu-build /opt/editr2 /opt/editr2
# Whoever it runs as may write the home folder, where caches go, and the working one.
ENV PATH=/opt/editr2/bin:$PATH PYTHONUNBUFFERED=1 HOME=/home/editr2 USER=editr2
RUN useradd --uid 10001 --create-home editr2 && mkdir /data && chmod 1777 /data /home/editr2
USER 10001
WORKDIR /data
ENTRYPOINT ["editr2"]
CMD ["--help"]

FROM nvidia/cuda:${CUDA_TAG} AS cuda
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# g++ and the headers stay: Triton compiles its launchers when a kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/editr2
WORKDIR /src
ARG TORCH_INDEX=
COPY constraints.txt ./
RUN /opt/editr2/bin/pip install --no-cache-dir --constraint constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY . .
ENV EDITR2_BUILD_CUDA=1
RUN /opt/editr2/bin/pip install --no-cache-dir --constraint constraints.txt \
    '.[judges,label,tensorboard,quantize]'
# Whoever it runs as may write the home folder, where caches go, and the working one.
ENV PATH=/opt/editr2/bin:$PATH PYTHONUNBUFFERED=1 HOME=/home/editr2 USER=editr2
RUN useradd --uid 10001 --create-home editr2 && mkdir /data && chmod 1777 /data /home/editr2
USER 10001
WORKDIR /data
ENTRYPOINT ["editr2"]
CMD ["--help"]
