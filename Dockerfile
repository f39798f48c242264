# An image for hosts with GPUs or TPUs, in whose working directory every `python -m diffdis_jax` command runs.
#
#   docker build --build-arg EXTRAS=cuda -t REGISTRY/diffdis:cuda .     # NVIDIA GPUs
#   docker build --build-arg EXTRAS=tpu -t REGISTRY/diffdis:tpu .       # TPUs; EXTRAS=tpu,wandb for a tracker too
#       with --build-arg COMMIT=$(git describe --always --abbrev=40 --exclude=\* --dirty) runs record their code
#   docker run --gpus=all --shm-size=1g REGISTRY/diffdis:cuda \
#       python -m diffdis_jax.train --config=configs/diffdis_cc3m.py:runlocal --workdir=/tmp/run
# By digest, for every architecture; `docker buildx imagetools inspect python:3.12-slim` prints a newer one.
FROM python:3.12-slim@sha256:57cd7c3a7a273101a6485ba99423ee568157882804b1124b4dd04266317710de

ARG EXTRAS=cuda

# The driver's libraries come from the host: by the container toolkit, or on GKE in /usr/local/nvidia.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64

WORKDIR /diffdis

# What is installed, before the sources, so that a change of these does not install gigabytes anew. The package is
# installed where it lies, editable, and its sources come after. requirements.lock says which versions.
COPY pyproject.toml requirements.txt requirements.lock README.md LICENSE NOTICE ./
COPY diffdis_jax/__init__.py diffdis_jax/
COPY diffdis_jax/data/clip_tokenizer.LICENSE diffdis_jax/data/
COPY diffdis_jax/data/layouts/zero_shot_sets.LICENSE diffdis_jax/data/layouts/
RUN case ",$EXTRAS," in *,cuda,* | *,tpu,*) ;; *) echo "EXTRAS is '$EXTRAS'; it should have cuda or tpu" >&2; exit 2 ;; esac \
    && python -m pip install --no-cache-dir --constraint=requirements.lock --editable ".[$EXTRAS]"

COPY diffdis_jax diffdis_jax
COPY configs configs
COPY launch launch

# Where there is no git, runs know their code by this.
ARG COMMIT=
RUN if [ -n "$COMMIT" ]; then echo "$COMMIT" >.commit; fi

# An ordinary user, who can write to its home and /tmp alone.
RUN useradd --create-home --uid=1000 diffdis
USER diffdis

CMD ["python", "-m", "diffdis_jax.train", "--help"]
