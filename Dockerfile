# CPU image with the pinned environment.   docker build -t nemo-aligner .   For GPUs: Dockerfile.gpu
FROM python:3.11-slim-bookworm

# a compiler, for the C kernels
RUN apt-get update && apt-get install -y --no-install-recommends git gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home aligner && install -d -o aligner /opt/nemo-aligner /work
USER aligner
WORKDIR /opt/nemo-aligner
COPY --chown=aligner . .
RUN bash scripts/test.sh --setup-only
ENV PATH=/opt/nemo-aligner/.venv/bin:$PATH
RUN python examples/nlp/gpt/train_gpt_sft.py --help >/dev/null
WORKDIR /work
CMD ["bash"]
