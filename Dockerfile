# CPU image with the pinned environment; for GPUs, start FROM an image with CUDA drivers' libraries instead.
FROM python:3.11-slim-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends git gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/nemo-aligner
COPY . .
RUN bash scripts/test.sh --setup-only
ENV PATH=/opt/nemo-aligner/.venv/bin:$PATH
CMD ["bash"]
