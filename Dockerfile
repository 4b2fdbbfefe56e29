# Search-R1 on NVIDIA GPUs: engines, training, retrieval. Needs a driver of 580 or newer and the NVIDIA container toolkit.
#
#   docker build -t search-r1 .
#   docker run --gpus all --ipc host --network host -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" \
#       -v "$HOME/.cache/huggingface:/home/search/.cache/huggingface" \
#       search-r1 bash train_grpo.sh experiment=nq_hotpotqa/qwen2.5-3b-grpo
#
# A retriever must answer at localhost:8000 of the host (README, On a cluster), or be named: retriever.url=...
# Mounted folders must be writable for user 1000. --ipc host: Ray and NCCL need more shared memory than 64 MB.
#
# torch's packages carry CUDA's libraries. What is to be compiled, such as flash-attn, needs CUDA_IMAGE with -devel-.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${CUDA_IMAGE}

ENV DEBIAN_FRONTEND=noninteractive PIP_CACHE_DIR=/var/cache/pip
# python3-dev and gcc: Triton compiles C against Python.h before its first kernel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates curl gcc g++ git python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --create-home --uid 1000 search \
    && mkdir /app \
    && chown search:search /app

USER 1000:1000
WORKDIR /app
ENV SETUP_DEVICE=gpu SETUP_VENV=/home/search/venv

# The packages are a layer of their own: they are installed again only when what names them changes
COPY --chown=search:search pyproject.toml setup.py LICENSE NOTICE ./
COPY --chown=search:search scripts/setup.sh scripts/requirements_met.py scripts/constraints-gpu.txt scripts/
COPY --chown=search:search verl/__init__.py verl/namesake.py verl/
COPY --chown=search:search verl/utils/__init__.py verl/utils/device.py verl/utils/
COPY --chown=search:search search_r1/__init__.py search_r1/__init__.py
RUN --mount=type=cache,target=/var/cache/pip,uid=1000 touch README.md && bash scripts/setup.sh hub dense-gpu lucene

COPY --chown=search:search . .
ENV PATH=/home/search/venv/bin:$PATH VIRTUAL_ENV=/home/search/venv
CMD ["bash", "train_grpo.sh"]
